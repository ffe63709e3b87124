"""The one pattern of most schedules: some forwards ahead, then a forward and a backward in turn, then what is left."""

from collections.abc import Iterator, Sequence

from meshwright.passes.schedules.pipeline import Compute, Order

Turn = tuple[int, int]
"""A stage and a microbatch."""


def alternate(
    forwards: Sequence[Turn], backwards: Sequence[Turn], *, ahead: int, weights_behind: int | None = None
) -> Order:
    """``ahead`` forwards, then a forward and a backward in turn, then the backwards that are left.

    forwards, backwards: what the rank runs of each, in this order. weights_behind: None for whole backwards; else each
    is split, and the backwards for the weights follow that many behind those for the inputs.
    """
    return tuple(_alternate(forwards, backwards, ahead, weights_behind))


def _alternate(
    forwards: Sequence[Turn], backwards: Sequence[Turn], ahead: int, weights_behind: int | None
) -> Iterator[Compute]:
    yield from (Compute("F", *turn) for turn in forwards[:ahead])
    for k, turn in enumerate(backwards):
        yield from (Compute("F", *forward) for forward in forwards[ahead + k : ahead + k + 1])
        yield Compute("B" if weights_behind is None else "I", *turn)
        if weights_behind is not None and k >= weights_behind:
            yield Compute("W", *backwards[k - weights_behind])
    if weights_behind is not None:
        yield from (Compute("W", *turn) for turn in backwards[max(0, len(backwards) - weights_behind) :])


def rounds(num_ranks: int, num_microbatches: int) -> int | None:
    """Into how many equal rounds of at least num_ranks microbatches (where there are as many) a step is cut; None where
    that leaves some over.
    """
    number = max(1, num_microbatches // num_ranks)
    return None if num_microbatches % number else number


def in_rounds(stages: Sequence[int], num_microbatches: int, number: int) -> tuple[Turn, ...]:
    """Round by round, all microbatches of a round through one stage before the next stage."""
    length = num_microbatches // number
    return tuple(
        (stage, microbatch)
        for begin in range(0, num_microbatches, length)
        for stage in stages
        for microbatch in range(begin, begin + length)
    )
