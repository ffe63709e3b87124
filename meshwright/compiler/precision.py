"""Reading every floating dtype as float64, for proofs that compare two programs to the last digits."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_NARROW = (torch.float16, torch.bfloat16, torch.float32)
_CASTS = {torch.Tensor.float: torch.Tensor.double, torch.Tensor.half: torch.Tensor.double,
          torch.Tensor.bfloat16: torch.Tensor.double}  # fmt: skip


class _Float64(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(
            torch.dtype, lambda dtype: torch.float64 if dtype in _NARROW else dtype, (args, kwargs or {})
        )
        return _CASTS.get(func, func)(*args, **kwargs)  # type: ignore[no-untyped-call]


def doubled(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float64, with the plain tensors that its modules hold."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.dtype in _NARROW:
                setattr(module, name, value.double())
    return model


class RealIndices(TorchFunctionMode):
    """Lists of numbers that index a meta tensor keep their values: torch would put them on the meta device too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in args[1]))
        return func(*args, **(kwargs or {}))


@contextmanager
def float64() -> Iterator[None]:
    """Inside this context torch reads float16, bfloat16 and float32 as float64, also where a model names them itself.

    Transformers upcasts to float32 by hand in norms, rotary tables and losses, which alone makes two correct programs
    differ by 1e-7. Build the model first, call ``model.double()``, then enter the context and run it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)
