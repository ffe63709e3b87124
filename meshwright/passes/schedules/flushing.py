"""GPipe and 1F1B: one stage a rank, whole backwards, the pipeline empty after every step."""

from collections.abc import Collection

from meshwright.passes.schedules.alternating import alternate
from meshwright.passes.schedules.pipeline import Edge, Order, Pipeline, has_gradient


def gpipe(pipeline: Pipeline) -> tuple[Order, ...]:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv 1811.06965). A stage keeps all alive."""
    return _in_turn(pipeline, (pipeline.num_microbatches,) * pipeline.num_ranks)


def gpipe_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (pipeline.num_microbatches,) * pipeline.num_ranks


def one_forward_one_backward(pipeline: Pipeline) -> tuple[Order, ...]:
    """1F1B: a few forwards ahead, then forward and backward in turn (Narayanan et al., PipeDream, arXiv 1806.03377).

    Stage s keeps at most num_stages - s microbatches alive, more only where ``forwards_ahead`` says so.
    """
    return _in_turn(pipeline, forwards_ahead(pipeline.num_stages, pipeline.edges))


def one_forward_one_backward_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    ahead = forwards_ahead(pipeline.num_stages, pipeline.edges)
    return tuple(min(pipeline.num_microbatches, number + 1) for number in ahead)


def forwards_ahead(num_stages: int, edges: Collection[Edge]) -> tuple[int, ...]:
    """How many forwards each stage of 1F1B runs before it takes forward and backward in turn.

    In a chain stage s runs num_stages - 1 - s, also when values without gradient skip stages. Where nothing is
    buffered, a skip with gradient allows a lead of two: further ahead, its source waits to be rid of a forward's result
    while its destination waits to be rid of a gradient. So a longer skip holds its destination back, and no stage on
    the way may run fewer than one that it feeds. The price is time: GPipe has no such wait and is faster there.
    """
    skips = any(has_gradient(edge) and edge[1] - edge[0] > 1 for edge in edges)
    lead = 2 if skips else num_stages
    ahead = [num_stages - 1 - stage for stage in range(num_stages)]
    before: list[int] = []
    while before != ahead:
        before = list(ahead)
        for source, destination, *_ in edges:
            ahead[destination] = max(ahead[destination], ahead[source] - lead)
            ahead[source] = max(ahead[source], ahead[destination])
    return tuple(ahead)


def _in_turn(pipeline: Pipeline, ahead: tuple[int, ...]) -> tuple[Order, ...]:
    orders = []
    for rank in range(pipeline.num_ranks):
        turns = [(rank, microbatch) for microbatch in range(pipeline.num_microbatches)]
        orders.append(alternate(turns, turns, ahead=ahead[rank]))
    return tuple(orders)
