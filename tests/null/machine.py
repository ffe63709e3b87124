"""A machine that runs the actions of all pipeline ranks with unbuffered messages; the proof has to agree with it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from meshwright.passes.schedules import Edge
from meshwright.runtime.actions import Action

Value = tuple[int, int, str, int]
"""From stage, to stage, F or B, microbatch."""


@dataclass(kw_only=True)
class Rank:
    """What a rank is waiting for before its next action, what it has heard and made."""

    row: Sequence[Action]
    at: int = 0
    to_send: list[Value] = field(default_factory=list)
    to_hear: list[Value] = field(default_factory=list)
    heard: list[tuple[Value, Value]] = field(default_factory=list)
    """What was expected, and what came."""
    done: list[tuple[int, str, int]] = field(default_factory=list)


def runs_right(
    rows: Sequence[Sequence[Action]], placement: Sequence[int], num_microbatches: int, edges: Collection[Edge]
) -> bool:
    """Run the actions with unbuffered messages matched by order alone; True if all of it comes to a right end."""
    ranks = [Rank(row=row) for row in rows]
    for number, rank in enumerate(ranks):
        listen(rank, number, placement)
    progress = True
    while progress:
        progress = False
        for number, rank in enumerate(ranks):
            progress |= hand_over(rank, number, ranks, placement)
            if rank.to_send or rank.to_hear or rank.at == len(rank.row):
                continue
            action = rank.row[rank.at]
            stage = stage_of(action, number, placement)
            if stage is None or placement[stage] != number:
                return False
            made = "F" if action.kind == "F" else "B"
            if action.runs:
                if not can_run(rank, action.kind, stage, action.microbatch, placement, edges):
                    return False
                rank.done.append((stage, action.kind, action.microbatch))
            elif (stage, action.kind, action.microbatch) not in rank.done and action.sends:
                return False
            rank.to_send = [(stage, peer, made, action.microbatch) for peer in action.sends]
            rank.at += 1
            listen(rank, number, placement)
            progress = True
    if any(rank.to_send or rank.heard or rank.at != len(rank.row) for rank in ranks):
        return False
    return all(
        complete([done for done in ranks[owner].done if done[0] == stage], num_microbatches)
        for stage, owner in enumerate(placement)
    )


def stage_of(action: Action, number: int, placement: Sequence[int]) -> int | None:
    if action.stage is not None:
        return action.stage if action.stage < len(placement) else None
    own = [stage for stage, rank in enumerate(placement) if rank == number]
    return own[0] if len(own) == 1 else None


def listen(rank: Rank, number: int, placement: Sequence[int]) -> None:
    """Begin the receives of the action that comes next."""
    if rank.at < len(rank.row):
        action = rank.row[rank.at]
        made = "F" if action.kind == "F" else "B"
        stage = stage_of(action, number, placement)
        rank.to_hear = [(peer, -1 if stage is None else stage, made, action.microbatch) for peer in action.receives]


def hand_over(rank: Rank, number: int, ranks: Sequence[Rank], placement: Sequence[int]) -> bool:
    """Pass what the peers are listening for, first to first."""
    passed = False
    for value in list(rank.to_send):
        peer = placement[value[1]] if value[1] < len(placement) else number
        first = (
            next(v for v in rank.to_send if v[1] < len(placement) and placement[v[1]] == peer)
            if peer != number
            else value
        )
        wanted = [v for v in ranks[peer].to_hear if v[0] < len(placement) and placement[v[0]] == number]
        if peer == number or not wanted or first != value:
            continue
        ranks[peer].to_hear.remove(wanted[0])
        rank.to_send.remove(value)
        ranks[peer].heard.append((wanted[0], value))
        passed = True
    return passed


def can_run(
    rank: Rank, kind: str, stage: int, microbatch: int, placement: Sequence[int], edges: Collection[Edge]
) -> bool:
    """Whether all that a computation takes is there, and nothing else came for it; takes it."""
    done = {(s, "F" if k == "F" else "B", m) for s, k, m in rank.done if k != "W"}
    made = "F" if kind == "F" else "B"
    if (stage, kind, microbatch) in rank.done:
        return False
    if kind == "W":
        return (stage, "I", microbatch) in rank.done
    if kind in "BI" and ((stage, "F", microbatch) not in done or (stage, "B", microbatch) in done):
        return False
    if made == "F":
        sources = {edge[0] for edge in edges if edge[1] == stage}
    else:
        sources = {edge[1] for edge in edges if edge[0] == stage and edge[2:] != (False,)}
    here = {source for source in sources if placement[source] == placement[stage]}
    if any((source, made, microbatch) not in done for source in here):
        return False
    expected = [(source, stage, made, microbatch) for source in sources - here]
    came = [pair for pair in rank.heard if pair[0][1:] == (stage, made, microbatch)]
    for pair in came:
        rank.heard.remove(pair)
    return sorted(came) == sorted((value, value) for value in expected)


def complete(done: Sequence[tuple[int, str, int]], num_microbatches: int) -> bool:
    """Every forward once, every backward whole or in both parts; forwards and sums of gradients ascend."""
    by_kind = {kind: [m for _, k, m in done if k == kind] for kind in "FBIW"}
    steps = list(range(num_microbatches))
    gradients = [m for _, kind, m in done if kind in "BW"]
    return (
        by_kind["F"] == steps
        and gradients == steps
        and sorted(by_kind["I"]) == sorted(by_kind["W"])
        and not set(by_kind["B"]) & set(by_kind["I"])
    )
