"""Random operators on the pieces of a program: replicas draw the same, pieces differ, a step can be drawn again.

What is drawn depends on the seed, the step, the site (the number of the call in the order of the model's own) and the
place, and on nothing that was drawn before: so microbatches differ and recomputation repeats. The place is

- "exact": the position of every element in the whole tensor, as one device would have it. Every mesh draws the same.
- "fast": the piece of the tensor that a rank has. It seeds torch's own generator (as the CPU has it, with 32 bits),
  whose fused kernels then draw; another mesh has other pieces and draws otherwise, from the same distribution.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from meshwright.runtime.errors import PlanError
from meshwright.runtime.groups import Groups
from meshwright.runtime.layout import Split
from meshwright.runtime.philox import derived_seed, normal, uniform

ALPHA = 1.7580993408473766
"""Alpha dropout puts minus this in the place of a dropped value (SELU's limit; Klambauer et al., arXiv 1706.02515)."""

_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@dataclass(slots=True, kw_only=True)
class Draws:
    """What all sites of a rank draw by: the seed of the run, and the step that is computed."""

    groups: Groups
    exact: bool
    seed: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """What one call of a random operator draws from. ``splits``: how its whole tensor is cut, outermost first."""

    draws: Draws
    site: int
    splits: tuple[tuple[str, Split], ...] = ()

    def uniform(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Float64 in [0, 1) by position, for a piece of ``shape``."""
        return uniform(self.positions(shape, device), self.draws.seed, self.site, self.draws.step)

    def normal(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Standard normal float64 by position, for a piece of ``shape``."""
        return normal(self.positions(shape, device), self.draws.seed, self.site, self.draws.step)

    def positions(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Where the elements of a piece of ``shape`` lie in the whole tensor, counted row by row. Raises PlanError."""
        result = torch.zeros((), dtype=torch.int64, device=device)
        for dim, size in enumerate(shape):
            index, whole = torch.arange(size, device=device), size
            for axis, split in reversed(self.splits):
                if split.dim == dim:
                    index, whole = self._placed(index, whole, axis, split.groups)
            result = result.unsqueeze(-1) * whole + index
        return result

    def _placed(self, index: torch.Tensor, size: int, axis: str, groups: int) -> tuple[torch.Tensor, int]:
        """Indices into a piece as indices into what is cut over ``axis``, and the size of that."""
        if size % groups:
            raise PlanError(f"a random operator has {size} of a dim that {axis} cuts in {groups} groups")
        pieces, block = self.draws.groups.size(axis), size // groups
        start = self.draws.groups.index(axis) * block
        return index // max(block, 1) * (block * pieces) + start + index % max(block, 1), size * pieces

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Torch's generator on ``device`` draws for this piece; outside of the context it goes on as it was."""
        piece = 0
        for axis, _ in self.splits:
            piece = piece * self.draws.groups.size(axis) + self.draws.groups.index(axis)
        generator = (
            torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
            if device.type == "cuda"
            else torch.default_generator
        )
        before = generator.get_state()
        generator.manual_seed(derived_seed(self.draws.seed, self.site, self.draws.step, piece))
        try:
            yield
        finally:
            generator.set_state(before)


# Dropout


def dropout(x: torch.Tensor, p: float, training: bool, random: Random) -> torch.Tensor:
    """``F.dropout``: in training each element is 0 with probability ``p``, the others are divided by ``1 - p``."""
    return _dropped(x, p, training, random, x.shape, F.dropout)


def feature_dropout(x: torch.Tensor, p: float, training: bool, random: Random) -> torch.Tensor:
    """``F.dropout1d`` to ``3d`` on (samples, channels, ...): whole channels of a sample are dropped."""
    return _dropped(x, p, training, random, channels(x.shape), torch.feature_dropout)


def alpha_dropout(x: torch.Tensor, p: float, training: bool, random: Random) -> torch.Tensor:
    """``F.alpha_dropout``: dropout that keeps mean and variance of standard normal values."""
    return _dropped(x, p, training, random, x.shape, F.alpha_dropout)


def feature_alpha_dropout(x: torch.Tensor, p: float, training: bool, random: Random) -> torch.Tensor:
    """``F.feature_alpha_dropout``: alpha dropout of whole channels of a sample."""
    return _dropped(x, p, training, random, channels(x.shape), F.feature_alpha_dropout)


def channels(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what feature dropout draws."""
    return (*shape[:2], *[1] * (len(shape) - 2))


def _dropped(
    x: torch.Tensor, p: float, training: bool, random: Random, shape: Sequence[int], fast: Callable[..., torch.Tensor]
) -> torch.Tensor:
    if not training:
        return x
    if not random.draws.exact:
        with random.seeded(x.device):
            return fast(x, p, True)
    # As torch's own decomposition computes it, so that one device rounds alike.
    keep = (random.uniform(shape, x.device) < 1 - p).to(x.dtype)
    if fast in (F.dropout, torch.feature_dropout):
        return x * keep.div_(1 - p)
    scale = 1 / math.sqrt((ALPHA**2 * p + 1) * (1 - p))
    shift = keep.add(-1).mul_(ALPHA * scale).add_(ALPHA * scale * p)
    return x * keep.mul_(scale) + shift


def attention_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    p: float,
    training: bool,
    random: Random,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` with dropout of the attention weights; by position it is written out."""
    if not training or not random.draws.exact:
        with random.seeded(query.device):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, p if training else 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    # Safe: a row without anything to attend to gives zeros, as in torch's own attention.
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    return dropout(weights, p, True, random) @ value


# Noise


def rand_like(x: torch.Tensor, random: Random, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``torch.rand_like``: uniform in [0, 1)."""
    return rand(x.shape, random, dtype or x.dtype, x.device)


def randn_like(x: torch.Tensor, random: Random, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``torch.randn_like``: standard normal."""
    return randn(x.shape, random, dtype or x.dtype, x.device)


def rand(shape: Sequence[int], random: Random, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.rand`` for this rank's piece, of ``shape``."""
    if not random.draws.exact:
        with random.seeded(device):
            return torch.rand(*shape, dtype=dtype, device=device)
    return rounded_down(random.uniform(shape, device), dtype)


def randn(shape: Sequence[int], random: Random, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.randn`` for this rank's piece, of ``shape``."""
    if not random.draws.exact:
        with random.seeded(device):
            return torch.randn(*shape, dtype=dtype, device=device)
    return random.normal(shape, device).to(dtype)


def rounded_down(fractions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 fractions as ``dtype`` without any becoming 1."""
    scale = 2.0 ** _DIGITS[dtype]
    return (fractions * scale).floor_().div_(scale).to(dtype)
