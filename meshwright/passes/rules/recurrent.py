"""Recurrent layers: every sample by itself, all layers and the sequence whole."""

import torch

from meshwright.passes.factors import Factor, Factors, Place
from meshwright.passes.rules.call import Call, Rules, first_of

aten = torch.ops.aten


def _recurrent(call: Call) -> Factors:
    """``batch_first`` says which dim of the input and the first result is the batch; of the states it is dim 1."""
    states = len(call.args[1]) if isinstance(call.args[1], (list, tuple)) else 1
    batch = 0 if call.argument(8, "batch_first") else 1
    weights = sum(value is not None for value in call.operands) - 1 - states
    size = first_of(call).shape[batch]
    operands = (Place(batch), *(Place(1),) * states, *(None,) * weights)
    results = tuple(Place(batch if i == 0 else 1) for i in range(len(call.results)))
    return Factors(factors=(Factor(size=size, operands=operands, results=results, whole=size == 1),))


RECURRENT: Rules = dict.fromkeys(
    (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), _recurrent
)
