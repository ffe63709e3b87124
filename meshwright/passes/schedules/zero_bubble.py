"""Zero bubble pipelines: the backward in two parts, of which the one for the weights fills what would be idle time.

All three are of Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241 (ZB-H1 and ZB-H2 its handcrafted ones).
"""

from meshwright.passes.schedules.alternating import alternate
from meshwright.passes.schedules.interleaving import round_length, turns
from meshwright.passes.schedules.pipeline import Order, Pipeline


def handcrafted_1(pipeline: Pipeline) -> tuple[Order, ...]:
    """ZB-H1: 1F1B whose backwards for the weights wait longer the later the rank, so that each keeps as many
    microbatches as the first rank of 1F1B. Bubble of the step: (p - 1) (F + I - W).
    """
    return _handcrafted(pipeline, 1)


def handcrafted_2(pipeline: Pipeline) -> tuple[Order, ...]:
    """ZB-H2: twice as many forwards ahead, which leaves no idle time on any rank if F, I and W take the same time.

    Each rank begins and ends later than the one before it, so the step has a bubble all the same if something
    synchronizes at its end: (p - 1) max(F, F + I - 2 W) from 2p - 1 microbatches on.
    """
    return _handcrafted(pipeline, 2)


def handcrafted_1_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (min(pipeline.num_microbatches, pipeline.num_ranks),) * pipeline.num_ranks


def handcrafted_2_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (min(pipeline.num_microbatches, 2 * pipeline.num_ranks - 1),) * pipeline.num_ranks


def interleaved_zero_bubble(pipeline: Pipeline) -> tuple[Order, ...]:
    """ZB-H1 over several looped chunks, in the rounds of interleaved 1F1B. Bubble: (p - 1) (F + I - W) / v."""
    last = pipeline.num_ranks - 1
    orders = []
    for rank in range(pipeline.num_ranks):
        forwards, backwards = turns(pipeline, rank)
        ahead = (pipeline.num_chunks - 1) * round_length(pipeline) + last - rank
        orders.append(alternate(forwards, backwards, ahead=ahead, weights_behind=rank))
    return tuple(orders)


def interleaved_zero_bubble_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    most = pipeline.num_microbatches * pipeline.num_chunks
    peak = (pipeline.num_chunks - 1) * round_length(pipeline) + pipeline.num_ranks
    return (min(most, peak),) * pipeline.num_ranks


def _handcrafted(pipeline: Pipeline, lead: int) -> tuple[Order, ...]:
    orders = []
    for rank in range(pipeline.num_ranks):
        microbatches = [(rank, microbatch) for microbatch in range(pipeline.num_microbatches)]
        ahead = lead * (pipeline.num_ranks - 1 - rank)
        orders.append(alternate(microbatches, microbatches, ahead=ahead, weights_behind=lead * rank))
    return tuple(orders)
