"""How a model on the meta device would fill its parameters, read off its own initialization without running it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_FILLS: dict[Any, tuple[str, tuple[float, ...]]] = {
    aten.normal_.default: ("normal_", (0.0, 1.0)),
    aten.uniform_.default: ("uniform_", (0.0, 1.0)),
    aten.fill_.Scalar: ("fill_", ()),
    aten.zero_.default: ("fill_", (0.0,)),
}
"""In-place operator -> its name on tensors and its default arguments."""


class _Recorder(TorchDispatchMode):
    """Notes which tensor is filled how; operators on the meta device compute nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fills: dict[int, tuple[str, tuple[float, ...]]] = {}
        self.copies: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLS:
            name, defaults = _FILLS[func]
            given = tuple(float(a) for a in args[1:] if isinstance(a, (int, float)))
            self.fills[id(args[0])] = (name, (*given, *defaults[len(given) :]))
        elif func is aten.copy_.default and not args[1].is_meta:
            self.copies[id(args[0])] = args[1]
        return func(*args, **(kwargs or {}))


def initial_values(model: nn.Module) -> tuple[dict[str, tuple[str, tuple[float, ...]]], dict[str, torch.Tensor]]:
    """How each meta parameter is filled, and the values of meta buffers that initialization computes.

    Runs the modules' ``reset_parameters`` and, for a Transformers model, its ``_init_weights`` on meta tensors. Both
    maps
    are empty for a model with real parameters.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    if not any(tensor.is_meta for _, tensor in named):
        return {}, {}
    recorder = _Recorder()
    whole: Callable[[nn.Module], None] | None = getattr(model, "_init_weights", None)
    with recorder, torch.no_grad():
        for module in model.modules():
            if any(not tensor.is_meta for tensor in [*module.parameters(False), *module.buffers(False)]):
                continue
            own: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if callable(own):
                own()
            if whole is not None:
                whole(module)
    fills = {name: recorder.fills[id(tensor)] for name, tensor in named if id(tensor) in recorder.fills}
    copies = {name: recorder.copies[id(tensor)] for name, tensor in named if id(tensor) in recorder.copies}
    return fills, copies
