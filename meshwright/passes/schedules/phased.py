"""Two chunks on every rank in V placement, handcrafted: ZB-V and DualPipeV, written as phases that repeat.

In the phases chunk 0 of a rank is the one on the way down, chunk 1 the one on the way up. Each word takes the next
microbatch of its kind and chunk; a W without chunk takes the backward that has waited longest.
"""

from collections.abc import Iterator

from meshwright.passes.schedules.pipeline import Compute, Order, Pipeline
from meshwright.runtime.actions import Kind

Phase = tuple[str, int]
"""Words, and how often they are repeated."""


def zero_bubble_v(pipeline: Pipeline) -> tuple[Order, ...]:
    """ZB-V: no rank idles between its first and its last action if F, I and W take the same time, and each keeps what
    the first rank of 1F1B keeps (Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241).

    Drawn for 2p - 1 microbatches or more; fewer are what is left of such a step without the others.
    """
    last = pipeline.num_ranks - 1
    drawn = max(pipeline.num_microbatches, 2 * last + 1)
    return tuple(
        _order(
            pipeline,
            rank,
            ("F0", 2 * (last - rank) + 1),
            ("F1 F0", rank),
            ("F1 I1 W1", last - rank + 1),
            ("F0 I0 W0 F1 I1 W1", drawn - 2 * last - 1 + rank),
            ("I0 W0 F1 I1 W1", last - rank),
            ("I0 I1", rank),
            ("I0 W0", last - rank + 1),
            ("W1", rank),
            ("W0", rank),
        )
        for rank in range(pipeline.num_ranks)
    )


def zero_bubble_v_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (2 * min(pipeline.num_ranks, pipeline.num_microbatches),) * pipeline.num_ranks


def dual_pipe_v(pipeline: Pipeline) -> tuple[Order, ...]:
    """DualPipeV: a forward of one chunk beside a backward of the other, so that the communication within one hides
    behind the computation of the other (DeepSeek-AI, DeepSeek-V3, arXiv 2412.19437, section 3.2.1, for DualPipe; cut in
    half to a V by Sea AI Lab, and published as DualPipeV in github.com/deepseek-ai/DualPipe).

    A pair to overlap stands as two actions one after the other. The backwards are whole, but for the first and the last
    of a rank.
    """
    last = pipeline.num_ranks - 1
    return tuple(
        _order(
            pipeline,
            rank,
            ("F0", 2 * (last - rank)),
            ("F0 F1", rank + 1),
            ("I1 W F1", last - rank),
            ("F0 B1 F1 B0", pipeline.num_microbatches - 2 * last - 1 + rank),
            ("B1 F1 B0", last - rank),
            ("B1 B0", (rank + 1) // 2),
            *([("I1 I0", (rank + 1) // 2)] if rank % 2 else [("B1 I0", 1), ("I1 I0", rank // 2)]),
            ("W I0", last - rank),
            ("W", rank + 1),
        )
        for rank in range(pipeline.num_ranks)
    )


def dual_pipe_v_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (2 * pipeline.num_ranks + 1,) * pipeline.num_ranks


def too_few_for_dual_pipe(pipeline: Pipeline) -> str | None:
    """Why DualPipeV is not defined for this number of microbatches, or None."""
    return None if pipeline.num_microbatches >= pipeline.num_stages else "they are fewer than the stages"


def _order(pipeline: Pipeline, rank: int, *phases: Phase) -> Order:
    return tuple(c for c in _read(pipeline, rank, phases) if c.microbatch < pipeline.num_microbatches)


def _read(pipeline: Pipeline, rank: int, phases: tuple[Phase, ...]) -> Iterator[Compute]:
    stages = (rank, pipeline.num_stages - 1 - rank)
    following: dict[tuple[Kind, int], int] = {}
    waiting: list[Compute] = []
    for words, times in phases:
        for word in words.split() * times:
            if word[0] == "W":
                oldest = next(w for w in waiting if word == "W" or w.stage == stages[int(word[1])])
                waiting.remove(oldest)
                yield oldest
                continue
            kind: Kind = "F" if word[0] == "F" else "B" if word[0] == "B" else "I"
            stage = stages[int(word[1])]
            counted: tuple[Kind, int] = ("F" if kind == "F" else "B", stage)
            microbatch = following.get(counted, 0)
            following[counted] = microbatch + 1
            yield Compute(kind, stage, microbatch)
            if kind == "I":
                waiting.append(Compute("W", stage, microbatch))
