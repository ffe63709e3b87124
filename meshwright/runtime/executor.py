"""The executor: runs a rank's actions, with the messages before and after them."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from meshwright.runtime.actions import KINDS, Action, Kind, fuse, stage_of
from meshwright.runtime.errors import RankError
from meshwright.runtime.groups import Groups
from meshwright.runtime.mail import Mail
from meshwright.runtime.messages import Links, Packet, Place
from meshwright.runtime.stage import Arrived, StageRun, Values


class Turn(NamedTuple):
    """Messages that start together, and the computation that follows them.

    action: the action that they come before; at the end of the step the one that they come after. receivers: how many
    stages on other ranks get what it makes. split: whether the backward comes in two parts. last: whether the stage's
    gradients are complete after it.
    """

    sends: tuple[Packet, ...]
    receives: tuple[Packet, ...]
    action: Action
    place: Place
    runs: bool
    receivers: int
    split: bool
    last: bool


class Timed(NamedTuple):
    """When a computation ran, in seconds: from ``asked`` to ``begin`` it waited for what it takes."""

    action: Action
    asked: float
    begin: float
    end: float


@dataclass(slots=True, kw_only=True)
class Executor:
    """Runs the stages of this rank.

    before_backward(stage, kind, last), after_backward(stage, kind, last): called around every backward, ``last`` with
    the one after which the stage's gradients are complete. entering(microbatch): called before every computation.
    timed: when the computations of the last step ran, by ``clock``.
    """

    stages: Mapping[int, StageRun]
    links: Links
    groups: Groups
    before_backward: Callable[[int, Kind, bool], None]
    after_backward: Callable[[int, Kind, bool], None]
    entering: Callable[[int], None] = lambda microbatch: None
    clock: Callable[[], float] = time.perf_counter
    mail: Mail = field(init=False)
    timed: list[Timed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mail = Mail(links=self.links, groups=self.groups)

    def turns(self, actions: Sequence[Action]) -> tuple[Turn, ...]:
        """Actions as ``run`` takes them. Raises BundleError for messages that no value is in."""
        receivers: Counter[Place] = Counter()
        for each in actions:
            receivers[self._place(each)] += len(each.sends)
        last = {self._place(action).stage: action for action in actions if action.runs and action.kind in "BW"}
        split = {(self._place(each).stage, each.microbatch) for each in actions if each.kind == "I"}
        turns = []
        for before, after in fuse(actions):
            action = after or before
            if action is None:
                continue
            place = self._place(action)
            turns.append(
                Turn(
                    sends=self.links.packets(before, () if before is None else before.sends, True),
                    receives=self.links.packets(after, () if after is None else after.receives, False),
                    action=action,
                    place=place,
                    runs=after is not None and after.runs,
                    receivers=receivers[place],
                    split=(place.stage, place.microbatch) in split,
                    last=last.get(place.stage) is action,
                )
            )
        return tuple(turns)

    def run(
        self,
        turns: Sequence[Turn],
        batches: Sequence[Values],
        prepared: Mapping[int, Values],
        symbols: Mapping[str, int],
        grad: bool,
    ) -> torch.Tensor | None:
        """Run a step's actions on the microbatches; returns the sum of their losses on the rank that has it.

        prepared: by stage. Raises RankError naming the action that failed and why.
        """
        self.mail.begin(symbols)
        self.timed.clear()
        for stage in self.stages.values():
            stage.clear()
        total: torch.Tensor | None = None
        for turn in turns:
            if turn.sends or turn.receives:
                try:
                    self.mail.exchange(turn.sends, turn.receives)
                except Exception as error:
                    where = "after" if turn is turns[-1] else "before"
                    raise self._failure(turn, error, f"in the messages {where} ") from error
            if not turn.runs:
                continue
            try:
                self.entering(turn.action.microbatch)
                asked = self.clock()
                arrived = self._arrived(turn)
                begin = self.clock()
                loss = self._compute(turn, arrived, batches, prepared, grad)
                self.timed.append(Timed(turn.action, asked, begin, self.clock()))
            except Exception as error:
                raise self._failure(turn, error, "in ") from error
            if loss is not None:
                total = loss if total is None else total + loss
        self.mail.end()
        return total

    def _arrived(self, turn: Turn) -> Arrived:
        """What other stages have for a computation, waited for."""
        stage = self.stages[turn.place.stage]
        if turn.action.kind == "W":
            return ()
        return self.mail.take(turn.place, stage.expected if turn.place.forward else stage.awaited)

    def _compute(
        self,
        turn: Turn,
        arrived: Arrived,
        batches: Sequence[Values],
        prepared: Mapping[int, Values],
        grad: bool,
    ) -> torch.Tensor | None:
        """One computation; returns the loss of a forward that has it."""
        (index, _, microbatch), stage, kind = turn.place, self.stages[turn.place.stage], turn.action.kind
        if kind == "F":
            available = {**batches[microbatch], **prepared[index]}
            results = stage.forward(microbatch, arrived, available, self.mail.shapes, grad=grad, split=turn.split)
            if stage.has_loss:
                return results["loss"]  # type: ignore[no-any-return]
            self.mail.put(turn.place, results, turn.receivers)
            return None
        self.before_backward(index, kind, turn.last)
        if kind == "W":
            stage.backward_weights(microbatch)
        else:
            self.mail.put(turn.place, stage.backward(microbatch, arrived), turn.receivers)
        self.after_backward(index, kind, turn.last)
        return None

    def _place(self, action: Action) -> Place:
        return Place(stage_of(action, tuple(self.stages)), action.kind == "F", action.microbatch)

    def _failure(self, turn: Turn, error: Exception, where: str) -> RankError:
        stage, kind, microbatch = turn.place.stage, turn.action.kind, turn.place.microbatch
        return RankError(
            f"rank {self.groups.rank} failed {where}{stage}{kind}{microbatch} {KINDS[kind]} of stage {stage}, "
            f"microbatch {microbatch}: {type(error).__name__}: {error}"
        )
