"""The schedules by name: what makes each of them, where its stages are, and what it declares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from meshwright.compiler.errors import PlanError
from meshwright.passes.schedules import controllable, flushing, interleaving, phased, zero_bubble
from meshwright.passes.schedules.pipeline import Order, Pipeline, Placement, looped, vee


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """A schedule.

    orders: what every rank computes. peaks: the bound that it declares, chunks alive at once on every rank.
    placement: (ranks, chunks) -> the rank of every stage. chunks: how many a rank has, None for any number from 2.
    undefined: why it does not exist for a number of microbatches, or None where it does.
    """

    orders: Callable[[Pipeline], tuple[Order, ...]]
    peaks: Callable[[Pipeline], tuple[int, ...]]
    placement: Callable[[int, int], Placement] = looped
    chunks: int | None = 1
    undefined: Callable[[Pipeline], str | None] = lambda pipeline: None

    def runs(self, num_chunks: int) -> bool:
        """Whether it exists for so many chunks on a rank."""
        return num_chunks == self.chunks if self.chunks is not None else num_chunks > 1


ALGORITHMS: Mapping[str, Algorithm] = {
    "gpipe": Algorithm(orders=flushing.gpipe, peaks=flushing.gpipe_peaks),
    "1f1b": Algorithm(orders=flushing.one_forward_one_backward, peaks=flushing.one_forward_one_backward_peaks),
    "interleaved": Algorithm(
        orders=interleaving.interleaved,
        peaks=interleaving.interleaved_peaks,
        chunks=None,
        undefined=interleaving.not_in_rounds,
    ),
    "looped-bfs": Algorithm(orders=interleaving.breadth_first, peaks=interleaving.breadth_first_peaks, chunks=None),
    "zb-h1": Algorithm(orders=zero_bubble.handcrafted_1, peaks=zero_bubble.handcrafted_1_peaks),
    "zb-h2": Algorithm(orders=zero_bubble.handcrafted_2, peaks=zero_bubble.handcrafted_2_peaks),
    "interleaved-zb": Algorithm(
        orders=zero_bubble.interleaved_zero_bubble,
        peaks=zero_bubble.interleaved_zero_bubble_peaks,
        chunks=None,
        undefined=interleaving.not_in_rounds,
    ),
    "zbv": Algorithm(orders=phased.zero_bubble_v, peaks=phased.zero_bubble_v_peaks, placement=vee, chunks=2),
    "dualpipe-v": Algorithm(
        orders=phased.dual_pipe_v,
        peaks=phased.dual_pipe_v_peaks,
        placement=vee,
        chunks=2,
        undefined=phased.too_few_for_dual_pipe,
    ),
    "v-half": Algorithm(orders=controllable.v_half, peaks=controllable.v_half_peaks, placement=vee, chunks=2),
    "v-min": Algorithm(orders=controllable.v_min, peaks=controllable.v_min_peaks, placement=vee, chunks=2),
}


def algorithm(name: str, pipeline: Pipeline) -> Algorithm:
    """The schedule of this name, which the pipeline is defined for.

    Raises PlanError for chunks that the schedule does not run, and for a number of microbatches that it is not defined
    for, with the nearest that it is.
    """
    found = ALGORITHMS[name]
    if pipeline.num_microbatches < 1:
        raise PlanError(
            f"a step of {pipeline.num_microbatches} microbatches: the least is 1\n  set microbatches=1 or more"
        )
    if not found.runs(pipeline.num_chunks):
        others = ", ".join(other for other, one in ALGORITHMS.items() if one.runs(pipeline.num_chunks))
        raise PlanError(
            f"schedule={name!r} runs {found.chunks or '2 or more'} of the stages on every rank, not "
            f"{pipeline.num_chunks}\n  use stages_per_rank=None, or a schedule of {pipeline.num_chunks}: {others}"
        )
    reason = found.undefined(pipeline)
    if reason is not None:
        raise PlanError(
            f"schedule={name!r} is not defined for {pipeline.num_microbatches} microbatches over pp="
            f"{pipeline.num_ranks}: {reason}\n  use microbatches={_nearest(found, pipeline)}, or another schedule"
        )
    return found


def _nearest(found: Algorithm, pipeline: Pipeline) -> str:
    """The nearest numbers of microbatches on both sides that a schedule is defined for."""
    number = pipeline.num_microbatches
    ways = (range(number - 1, 0, -1), range(number + 1, number + pipeline.num_stages + 1))
    defined = [
        next((str(n) for n in way if found.undefined(replace(pipeline, num_microbatches=n)) is None), None)
        for way in ways
    ]
    return " or ".join(filter(None, defined))
