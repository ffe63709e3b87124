"""V-Half and V-Min: half and a third of the activations of 1F1B, in V placement.

After Qi et al., Pipeline Parallelism with Controllable Memory, arXiv 2405.15362: every microbatch runs through the same
building block, six slots after the one before it, and the activations on a rank are as long-lived as the block makes
them. A block is made of the delay from rank to rank on each of four ways: forward down and up, backward down and up.
Here the smallest blocks that keep to the memory are found by trying all delays, then squeezed for the times given.
"""

import itertools
from collections.abc import Iterator, Mapping

from meshwright.passes.schedules.pipeline import Compute, Order, Pipeline, chain, vee
from meshwright.passes.schedules.simulate import simulate
from meshwright.passes.schedules.squeezing import squeeze
from meshwright.runtime.actions import Kind

PERIOD = 6
"""Slots from a microbatch to the next: F, I and W of two chunks."""

DELAYS = range(1, 5)
TRIED = 4
"""How many blocks are squeezed: the shortest, of which the fastest is taken."""

Slots = Mapping[tuple[Kind, int], int]
"""The slots of microbatch 0 on one rank, by kind and chunk; chunk 0 is the one on the way down."""


def v_half(pipeline: Pipeline) -> tuple[Order, ...]:
    """About half the activations of 1F1B; the bubble is about p / 2m of the time, or less."""
    return _within(pipeline, 2 * ((pipeline.num_ranks + 2) // 2))


def v_min(pipeline: Pipeline) -> tuple[Order, ...]:
    """About a third of the activations of 1F1B; the bubble is about 2p / 3m of the time, or less."""
    return _within(pipeline, 2 * ((pipeline.num_ranks + 4) // 3))


def v_half_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (2 * min((pipeline.num_ranks + 2) // 2, pipeline.num_microbatches),) * pipeline.num_ranks


def v_min_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (2 * min((pipeline.num_ranks + 4) // 3, pipeline.num_microbatches),) * pipeline.num_ranks


def _within(pipeline: Pipeline, most: int) -> tuple[Order, ...]:
    """The fastest of the shortest blocks that keep at most ``most`` chunks alive."""
    blocks = [_block(pipeline.num_ranks, delays) for delays in itertools.product(DELAYS, repeat=4)]
    fitting = sorted((b for b in blocks if max(map(_alive, b)) <= most), key=lambda b: max(max(s.values()) for s in b))
    place = (vee(pipeline.num_ranks), chain(pipeline.num_stages), pipeline.costs)
    repeated = [_repeated(pipeline, block) for block in fitting[:TRIED]]
    found = [*repeated, *(squeeze(orders, *place, most) for orders in repeated)]
    return min(found, key=lambda orders: simulate(orders, *place).makespan)


def _block(num_ranks: int, delays: tuple[int, ...]) -> tuple[Slots, ...]:
    """The first free slots at least so far from rank to rank; one slot where the way turns on a rank."""
    down = range(num_ranks)
    slots: list[dict[tuple[Kind, int], int]] = [{} for _ in down]
    ways: tuple[tuple[Kind, int, range], ...] = (
        ("F", 0, down),
        ("F", 1, down[::-1]),
        ("I", 1, down),
        ("I", 0, down[::-1]),
    )
    before = -1
    for (kind, chunk, ranks), delay in zip(ways, delays, strict=True):
        for step, rank in enumerate(ranks):
            before = _free(slots[rank], before + (delay if step else 1))
            slots[rank][kind, chunk] = before
    for own in slots:
        weights: Slots = min((_with_weights(own, chunks) for chunks in ((1, 0), (0, 1))), key=_total)
        own.update(weights)
    return tuple(slots)


def _total(slots: Slots) -> int:
    return sum(slots.values())


def _with_weights(slots: Slots, chunks: tuple[int, ...]) -> Slots:
    """Slots for the backwards for the weights, given to the chunks in this order."""
    found: dict[tuple[Kind, int], int] = {}
    for chunk in chunks:
        found["W", chunk] = _free({**slots, **found}, slots["I", chunk] + 1)
    return found


def _free(slots: Slots, earliest: int) -> int:
    """The first slot from ``earliest`` on that no other microbatch uses either."""
    used = {slot % PERIOD for slot in slots.values()}
    return next(slot for slot in itertools.count(earliest) if slot % PERIOD not in used)


def _alive(slots: Slots) -> int:
    """Chunks alive at once on a rank that repeats its slots for ever."""
    return max(
        sum(
            (slots["W", chunk] - slots["F", chunk] - (phase - slots["F", chunk]) % PERIOD) // PERIOD + 1
            for chunk in (0, 1)
        )
        for phase in range(PERIOD)
    )


def _repeated(pipeline: Pipeline, block: tuple[Slots, ...]) -> tuple[Order, ...]:
    def computes(rank: int) -> Iterator[tuple[int, Compute]]:
        for (kind, chunk), slot in block[rank].items():
            stage = pipeline.num_stages - 1 - rank if chunk else rank
            for microbatch in range(pipeline.num_microbatches):
                yield slot + PERIOD * microbatch, Compute(kind, stage, microbatch)

    return tuple(tuple(compute for _, compute in sorted(computes(rank))) for rank in range(pipeline.num_ranks))
