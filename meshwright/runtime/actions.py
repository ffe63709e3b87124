"""The schedule of a rank as data and as text.

``F0>2  F1>2  2>B0`` runs the forward of microbatch 0 and sends its result to rank 2, the same with microbatch 1, then
receives from rank 2 and runs the backward of microbatch 0. Arrows point the way the data goes. Several peers are
separated by commas (``0,1>F2>3``); where peers are stages instead of ranks they carry an s (``F0>s1  s1>B0``).

A rank that runs several stages names the stage first: ``s0>1F3>s2`` is the forward of stage 1, microbatch 3. A backward
may come in two parts, ``1I3`` for the inputs and later ``1W3`` for the weights. What travels apart from its computation
stands in brackets: ``s0>[1F3]  5F0  1F3`` receives for 1F3, runs 5F0, then 1F3; ``[1F3]>s2`` sends what 1F3 has made.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Kind = Literal["F", "B", "I", "W"]
Peers = Literal["rank", "stage"]

KINDS: Mapping[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "backward for the inputs",
    "W": "backward for the weights",
}
PREFIX: Mapping[Peers, str] = {"rank": "", "stage": "s"}
OTHER: Mapping[Peers, Peers] = {"rank": "stage", "stage": "rank"}
NUMBER = "(?:0|[1-9][0-9]*)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One microbatch's forward or backward (see ``KINDS``), with the messages before and after it.

    stage: the stage it is of; None where the rank runs one stage only. receives: peers that something comes from before
    the computation; sends: peers that its results go to. A peer stands in each at most once: all values between two
    peers for one action travel as one message. runs: False for messages alone, which stand apart from the computation
    that they are of; they go one way. Raises ValueError.
    """

    kind: Kind
    microbatch: int
    stage: int | None = None
    receives: tuple[int, ...] = ()
    sends: tuple[int, ...] = ()
    runs: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            known = ", ".join(f"{kind} ({meaning})" for kind, meaning in KINDS.items())
            raise ValueError(f"an action is one of {known}, not {self.kind!r}")
        if self.microbatch < 0:
            raise ValueError(f"microbatch {self.microbatch} is negative")
        if self.stage is not None and self.stage < 0:
            raise ValueError(f"stage {self.stage} is negative")
        for verb, peers in (("receives from", self.receives), ("sends to", self.sends)):
            if any(peer < 0 for peer in peers):
                raise ValueError(f"{self.name} {verb} {min(peers)}, a negative number")
            if len(set(peers)) < len(peers):
                raise ValueError(f"{self.name} {verb} a peer twice: {', '.join(map(str, peers))}")
            if peers and self.kind == "W":
                raise ValueError(f"{self.name} {verb} {peers[0]}: a backward for the weights has no messages")
        if not self.runs and bool(self.receives) == bool(self.sends):
            raise ValueError(f"[{self.name}] stands for messages alone and either receives or sends")

    @property
    def name(self) -> str:
        """Without messages: ``F3``, or ``1F3`` where the rank runs several stages."""
        return f"{'' if self.stage is None else self.stage}{self.kind}{self.microbatch}"


def parse(text: str, peers: Peers = "rank") -> tuple[Action, ...]:
    """The actions of a schedule text, whose peers are written as ranks or as stages; the inverse of ``render``.

    Raises ValueError with the position (column from 0) of the first malformed action.
    """
    peer = f"{PREFIX[peers]}{NUMBER}"
    some = f"{peer}(?:,{peer})*"
    form = re.compile(f"(?:({some})>)?(\\[)?({NUMBER})?([FBIW])({NUMBER})(\\])?(?:>({some}))?")
    actions = []
    for word in re.finditer(r"\S+", text):
        found = form.fullmatch(word[0])
        if found is None or bool(found[2]) != bool(found[6]):
            example = render([Action(kind="F", microbatch=2, receives=(0, 1), sends=(3,))], peers)
            raise ValueError(
                f"{word[0]!r} at position {word.start()} is no action with {peers}s as peers, as in {example}"
            )
        receives, bracket, stage, kind, microbatch, _, sends = found.groups()
        try:
            actions.append(
                Action(
                    kind=cast(Kind, kind),
                    microbatch=int(microbatch),
                    stage=None if stage is None else int(stage),
                    receives=_numbers(receives),
                    sends=_numbers(sends),
                    runs=not bracket,
                )
            )
        except ValueError as reason:
            raise ValueError(f"{word[0]!r} at position {word.start()}: {reason}") from None
    return tuple(actions)


def render(actions: Iterable[Action], peers: Peers = "rank") -> str:
    """The text of a schedule, two spaces between actions, with peers written as ranks or as stages."""

    def some(numbers: tuple[int, ...]) -> str:
        return ",".join(f"{PREFIX[peers]}{number}" for number in numbers)

    def one(action: Action) -> str:
        before = f"{some(action.receives)}>" if action.receives else ""
        after = f">{some(action.sends)}" if action.sends else ""
        return f"{before}{action.name if action.runs else f'[{action.name}]'}{after}"

    return "  ".join(map(one, actions))


def stages_on(placement: Sequence[int], place: int) -> tuple[int, ...]:
    """The stages on a pipeline rank; ``placement`` is the pipeline rank of every stage."""
    return tuple(stage for stage, other in enumerate(placement) if other == place)


def stage_of(action: Action, stages: Sequence[int]) -> int:
    """The stage of an action of a rank that runs ``stages``: the only one, where the action does not name it."""
    return stages[0] if action.stage is None else action.stage


def peers_of(stages: Sequence[int]) -> Peers:
    """How the schedule of a rank that runs these stages names its peers: as stages where it runs several, because then
    a rank may send several values to a stage.
    """
    return "rank" if len(stages) == 1 else "stage"


def to_ranks(actions: Iterable[Action], rank_of_stage: Mapping[int, int] | Sequence[int]) -> tuple[Action, ...]:
    """The same actions with peers as ranks. Raises ValueError for a stage that ``rank_of_stage`` does not have."""

    return tuple(_with_peers(action, rank_of_stage, "stage") for action in actions)


def to_stages(actions: Iterable[Action], stage_of_rank: Mapping[int, int]) -> tuple[Action, ...]:
    """The inverse of ``to_ranks`` where every rank runs one stage. Raises ValueError for a rank without one."""
    return tuple(_with_peers(action, stage_of_rank, "rank") for action in actions)


def _with_peers(action: Action, other: Mapping[int, int] | Sequence[int], peers: Peers) -> Action:
    try:
        receives, sends = ([other[peer] for peer in some] for some in (action.receives, action.sends))
    except LookupError:
        raise ValueError(f"{render([action], peers)} names a {peers} without a {OTHER[peers]}") from None
    return dataclasses.replace(action, receives=tuple(receives), sends=tuple(sends))


def forwards(actions: Iterable[Action]) -> tuple[Action, ...]:
    """The forwards alone, with their messages: what an evaluation runs."""
    return tuple(action for action in actions if action.kind == "F")


def fuse(actions: Iterable[Action]) -> tuple[tuple[Action | None, Action | None], ...]:
    """The exchanges of a rank: one before each action and one after the last, as (action before, action after).

    The sends of the action before and the receives of the action after start together; without that 1F1B deadlocks
    where nothing is buffered. An exchange begins when the action before is computed and the previous exchange is over.
    """
    return tuple(itertools.pairwise((None, *actions, None)))


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall("[0-9]+", text or ""))
