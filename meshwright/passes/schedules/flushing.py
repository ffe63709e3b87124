"""GPipe and 1F1B: one stage a rank, whole backwards, the pipeline empty after every step."""

from meshwright.passes.schedules.alternating import alternate
from meshwright.passes.schedules.pipeline import Order, Pipeline


def gpipe(pipeline: Pipeline) -> tuple[Order, ...]:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv 1811.06965). A stage keeps all alive."""
    return _in_turn(pipeline, (pipeline.num_microbatches,) * pipeline.num_ranks)


def gpipe_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (pipeline.num_microbatches,) * pipeline.num_ranks


def one_forward_one_backward(pipeline: Pipeline) -> tuple[Order, ...]:
    """1F1B: a few forwards ahead, then forward and backward in turn (Narayanan et al., PipeDream, arXiv 1806.03377).

    Stage s keeps at most num_stages - s microbatches alive.
    """
    return _in_turn(pipeline, tuple(reversed(range(pipeline.num_ranks))))


def one_forward_one_backward_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return tuple(min(pipeline.num_microbatches, pipeline.num_ranks - rank) for rank in range(pipeline.num_ranks))


def _in_turn(pipeline: Pipeline, ahead: tuple[int, ...]) -> tuple[Order, ...]:
    orders = []
    for rank in range(pipeline.num_ranks):
        turns = [(rank, microbatch) for microbatch in range(pipeline.num_microbatches)]
        orders.append(alternate(turns, turns, ahead=ahead[rank]))
    return tuple(orders)
