"""Several chunks of the model on every rank, looped: smaller bubbles for more messages."""

from meshwright.passes.schedules.alternating import alternate, in_rounds, rounds
from meshwright.passes.schedules.pipeline import Order, Pipeline


def interleaved(pipeline: Pipeline) -> tuple[Order, ...]:
    """Interleaved 1F1B: depth first over rounds of microbatches (Narayanan et al., Megatron-LM, arXiv 2104.04473).

    A rank runs the microbatches of a round through one of its chunks, then through the next; the backwards take the
    chunks in the opposite order. The bubble of 1F1B is divided by the number of chunks. The paper's rounds are of
    num_ranks microbatches; longer ones serve numbers of microbatches that num_ranks does not divide.
    """
    orders = []
    for rank in range(pipeline.num_ranks):
        forwards, backwards = turns(pipeline, rank)
        orders.append(alternate(forwards, backwards, ahead=_ahead(pipeline, rank)))
    return tuple(orders)


def interleaved_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    most = pipeline.num_microbatches * pipeline.num_chunks
    return tuple(min(most, _ahead(pipeline, rank) + 1) for rank in range(pipeline.num_ranks))


def breadth_first(pipeline: Pipeline) -> tuple[Order, ...]:
    """Looped BFS: all microbatches through one chunk before the next (Lamy-Poirier, arXiv 2211.05953).

    The bubble is that of interleaved 1F1B, and all microbatches stay alive; but a chunk's parameters are used in one
    run, so under ZeRO-3 they are gathered once forward and once backward, and gradients can be reduced early.
    """
    number = pipeline.num_microbatches
    orders = []
    for rank in range(pipeline.num_ranks):
        stages = range(rank, pipeline.num_stages, pipeline.num_ranks)
        forwards, backwards = in_rounds(stages, number, 1), in_rounds(stages[::-1], number, 1)
        orders.append(alternate(forwards, backwards, ahead=len(forwards)))
    return tuple(orders)


def breadth_first_peaks(pipeline: Pipeline) -> tuple[int, ...]:
    return (pipeline.num_microbatches * pipeline.num_chunks,) * pipeline.num_ranks


def turns(pipeline: Pipeline, rank: int) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """The forwards and the backwards of a rank, round by round."""
    stages = range(rank, pipeline.num_stages, pipeline.num_ranks)
    number = rounds(pipeline.num_ranks, pipeline.num_microbatches)
    assert number is not None
    microbatches = pipeline.num_microbatches
    return in_rounds(stages, microbatches, number), in_rounds(stages[::-1], microbatches, number)


def round_length(pipeline: Pipeline) -> int:
    return pipeline.num_microbatches // (rounds(pipeline.num_ranks, pipeline.num_microbatches) or 1)


def not_in_rounds(pipeline: Pipeline) -> str | None:
    """Why interleaving is not defined for this number of microbatches, or None."""
    if rounds(pipeline.num_ranks, pipeline.num_microbatches) is not None:
        return None
    return f"they make no equal rounds of at least {pipeline.num_ranks}"


def _ahead(pipeline: Pipeline, rank: int) -> int:
    """All chunks but the last for a whole round, and two for every rank that follows: one to get there, one back."""
    return (pipeline.num_chunks - 1) * round_length(pipeline) + 2 * (pipeline.num_ranks - 1 - rank)
