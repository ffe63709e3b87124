"""One device draws as a compiled program does: the reference for ``Plan(random="exact")``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.compiler.errors import UnsupportedError
from meshwright.compiler.random import draws, is_random
from meshwright.runtime.groups import Groups
from meshwright.runtime.random import Draws, Random, rand, randn

aten = torch.ops.aten


@contextmanager
def exact_random(seed: int = 0, step: int = 0) -> Iterator[None]:
    """Inside, the forward of a model on one device draws what a program with ``Plan(random="exact")`` draws.

    seed: the Trainer's. step: how many optimizer steps came before. One forward of the whole batch goes into one
    context; attention is computed by torch's plain kernel, which alone draws by rows and columns.

    >>> with exact_random(seed=0, step=trainer.num_steps):
    ...     loss = model(**batch).loss

    Raises UnsupportedError for a random operator that a program cannot have either.
    """
    groups = Groups(sizes={}, rank=0, device=torch.device("cpu"), microbatches=1)
    with sdpa_kernel(SDPBackend.MATH), _Positions(Draws(groups=groups, exact=True, seed=seed, step=step)):
        yield


class _Positions(TorchDispatchMode):
    """Every call that draws takes the next site: torch calls one such operator for each that a capture has."""

    def __init__(self, shared: Draws):
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared, self.count = shared, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
        arguments = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if not draws(func, arguments):
            return func(*args, **kwargs)
        if func not in _DRAWN:
            raise UnsupportedError(f"{func} draws random numbers in a way that no compiled program can have")
        self.count += 1
        return _DRAWN[func](Random(draws=self.shared, site=self.count - 1), arguments)


Arguments = Mapping[str, Any]


def _hits(random: Random, like: torch.Tensor, chance: float | torch.Tensor) -> torch.Tensor:
    return (random.uniform(like.shape, like.device) < chance).to(like.dtype)


def _native_dropout(random: Random, given: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    x, p = given["input"], given["p"]
    keep = random.uniform(x.shape, x.device) < 1 - p
    return x * keep.to(x.dtype).div_(1 - p), keep


def _filled(noise: Callable[..., torch.Tensor]) -> Callable[[Random, Arguments], torch.Tensor]:
    """``torch.rand(size)`` and ``torch.rand_like(x)``."""

    def draw(random: Random, given: Arguments) -> torch.Tensor:
        like: torch.Tensor | None = given.get("self")
        dtype = given["dtype"] or (torch.get_default_dtype() if like is None else like.dtype)
        device = given["device"] or (torch.get_default_device() if like is None else like.device)
        shape = given["size"] if like is None else like.shape
        return noise(shape, random, dtype, torch.device(device))

    return draw


def _uniform(random: Random, given: Arguments) -> torch.Tensor:
    x, low, high = given["self"], given["from"], given["to"]
    noise = rand(x.shape, random, x.dtype, x.device)
    return x.copy_(noise * (high - low) + low)  # type: ignore[no-any-return]


def _normal(random: Random, given: Arguments) -> torch.Tensor:
    x = given["self"]
    return x.copy_(randn(x.shape, random, x.dtype, x.device) * given["std"] + given["mean"])  # type: ignore[no-any-return]


_DRAWN: Mapping[Any, Callable[[Random, Arguments], Any]] = {
    aten.bernoulli_.float: lambda random, given: given["self"].copy_(_hits(random, given["self"], given["p"])),
    aten.bernoulli_.Tensor: lambda random, given: given["self"].copy_(_hits(random, given["self"], given["p"])),
    aten.bernoulli.default: lambda random, given: _hits(random, given["self"], given["self"]),
    aten.bernoulli.p: lambda random, given: _hits(random, given["self"], given["p"]),
    aten.bernoulli.Tensor: lambda random, given: _hits(random, given["self"], given["p"]),
    aten.native_dropout.default: _native_dropout,
    aten.rand.default: _filled(rand),
    aten.rand_like.default: _filled(rand),
    aten.uniform_.default: _uniform,
    aten.randn.default: _filled(randn),
    aten.randn_like.default: _filled(randn),
    aten.normal_.default: _normal,
    aten.normal.float_float: lambda random, given: _filled(randn)(random, given).mul_(given["std"]).add_(given["mean"]),
}
"""Random operators as they arrive under autograd -> the same by position."""
