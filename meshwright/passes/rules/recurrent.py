"""Recurrent layers: every sample by itself, all layers and the sequence whole."""

import torch

from meshwright.passes.factors import Factor, Factors, Place
from meshwright.passes.rules.call import Call, Rules

aten = torch.ops.aten


def _recurrent(call: Call) -> Factors | None:
    """``batch_first`` says which dim of the input and of the outputs is the batch; of the states it is dim 1.

    Of the results only those are given that are read: outputs begin as the input does, and states otherwise.
    """
    source, state = call.operands[:2]
    assert source is not None and state is not None
    states = len(call.args[1]) if isinstance(call.args[1], (list, tuple)) else 1
    batch = 0 if call.argument(8, "batch_first") else 1
    if batch == 0 and source.shape[:2] == state.shape[:2]:
        return None  # as many samples as layers and as steps: outputs and states look alike
    weights = sum(value is not None for value in call.operands) - 1 - states
    size = source.shape[batch]
    operands = (Place(batch), *(Place(1),) * states, *(None,) * weights)
    results = tuple(Place(batch if result.shape[:2] == source.shape[:2] else 1) for result in call.results)
    return Factors(factors=(Factor(size=size, operands=operands, results=results, whole=size == 1),))


RECURRENT: Rules = dict.fromkeys(
    (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), _recurrent
)
