"""Each message once at either end, those of the edges and no others, in one order at both ends."""

import collections
from collections.abc import Iterator

from meshwright.passes.prove.case import Case, Place

Message = tuple[int, int, bool, int]
"""Sending stage, receiving stage, whether a forward's result, microbatch."""


def matching(case: Case) -> Iterator[str]:
    """Sends and receives are one to one, are those of the edges between ranks, and stand after what makes and before
    what takes them.
    """
    for rank, action, _ in case.actions():
        stage = case.stage(rank, action)
        maker = case.makers.get((stage, action.kind == "F", action.microbatch))
        if not action.runs and (maker is None or case.rows[rank][maker[1]].kind != action.kind):
            yield f"{case.at(rank, action)} is of {action.name}, which is not run there"
    needed: set[Message] = set()
    for microbatch in range(case.num_microbatches):
        for source, destination, *gradient in case.edges:
            if case.placement[source] != case.placement[destination]:
                needed.add((source, destination, True, microbatch))
                if gradient != [False] and not case.forward_only:
                    needed.add((destination, source, False, microbatch))
    sent, received = list(sends(case)), list(receives(case))
    for verb, ends in (("sends", sent), ("receives", received)):
        for message, times in collections.Counter(message for message, _ in ends).items():
            if times > 1:
                again = [place for one, place in ends if one == message][1]
                peer = f"to stage {message[1]}" if verb == "sends" else f"from stage {message[0]}"
                yield f"{case.at_place(again)} {verb} {peer} a second time"
    out, into = {message for message, _ in sent}, {message for message, _ in received}
    for message in sorted((out | into | needed) - (out & into & needed)):
        source, destination, forward, microbatch = message
        sender, receiver = (case.at_place(case.makers[stage, forward, microbatch]) for stage in (source, destination))
        if message not in out and message not in into:
            yield f"{sender} does not send to {receiver}, though an edge between them needs it"
        elif message not in into:
            yield f"{sender} sends to {receiver}, which does not receive from it"
        elif message not in out:
            yield f"{receiver} receives from {sender}, which does not send to it"
        else:
            yield f"{sender} sends to {receiver}, though no edge between them needs it"
    for message, (rank, index) in sent:
        if index < case.makers[message[0], *message[2:]][1]:
            yield f"{case.at_place((rank, index))} sends before the result is made"
    for message, (rank, index) in received:
        if index > case.makers[message[1], *message[2:]][1]:
            yield f"{case.at_place((rank, index))} receives after it was needed"


def message_order(case: Case) -> Iterator[str]:
    """The k-th send from one rank to another is the other's k-th receive from it: backends match messages by order."""
    pairs: dict[Place, tuple[list[Message], list[Message]]] = {}
    for direction, ends in enumerate((sends(case), receives(case))):
        for message, _ in ends:
            pair = case.placement[message[0]], case.placement[message[1]]
            pairs.setdefault(pair, ([], []))[direction].append(message)
    for (source, destination), (sent, received) in pairs.items():
        for k, (one, other) in enumerate(zip(sent, received, strict=True)):
            if one != other:
                names = [case.rows[rank][index].name for rank, index in (_taker(case, one), _taker(case, other))]
                yield (
                    f"send {k} from pipeline rank {source} to pipeline rank {destination} is that of {names[0]}, "
                    f"but receive {k} there is that of {names[1]}"
                )


def sends(case: Case) -> Iterator[tuple[Message, Place]]:
    """Every message that is sent, in each rank's order, and the action that does it."""
    for rank, action, index in case.actions():
        for peer in action.sends:
            yield (case.stage(rank, action), peer, action.kind == "F", action.microbatch), (rank, index)


def receives(case: Case) -> Iterator[tuple[Message, Place]]:
    """Every message that is received, in each rank's order, and the action that does it."""
    for rank, action, index in case.actions():
        for peer in action.receives:
            yield (peer, case.stage(rank, action), action.kind == "F", action.microbatch), (rank, index)


def _taker(case: Case, message: Message) -> Place:
    """The computation that needs it."""
    return case.makers[message[1], *message[2:]]
