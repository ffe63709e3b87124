"""Philox4x32-10: random numbers as a function of a key and a counter, without a state.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the
generator of cuRAND, JAX and torch's CUDA kernels. Words of 32 bits stand in Python ints or in int64 tensors alike.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch

Word = TypeVar("Word", int, torch.Tensor)

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

CHUNK = {"cpu": 1 << 16}
"""Elements that are drawn at once: what stays in a core's cache."""
LARGE_CHUNK = 1 << 24

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """The four words of a block, from the four of its counter and the two of the key."""
    a, b, c, d = counter
    for step in range(_ROUNDS):
        # int64 wraps around where Python does not; the low 64 bits are the same, and only they are read.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        k, m = ((word + step * weyl) & MASK for word, weyl in zip(key, _WEYL, strict=True))
        a, b, c, d = (
            ((second >> 32) & MASK) ^ b ^ k,
            second & MASK,
            ((first >> 32) & MASK) ^ d ^ m,
            first & MASK,
        )
    return a, b, c, d


def halves(number: int) -> tuple[int, int]:
    """The low and the high word of the low 64 bits of a number."""
    return number & MASK, (number >> 32) & MASK


def derived_seed(seed: int, site: int, step: int, piece: int) -> int:
    """A seed for another generator, 63 bits: different for each piece of what a site draws in a step."""
    low, high, _, _ = philox((*halves(piece), site & MASK, step & MASK), halves(seed))
    return low | (high & 0x7FFFFFFF) << 32


def uniform(positions: torch.Tensor, seed: int, site: int, step: int) -> torch.Tensor:
    """Float64 in [0, 1), one for each position (int64, from 0): the same on every device."""
    return _drawn(positions, seed, site, step, lambda words: _fraction(words[0], words[1]))


def normal(positions: torch.Tensor, seed: int, site: int, step: int) -> torch.Tensor:
    """Standard normal float64, one for each position (Box and Muller): the same on every device but for rounding."""

    def polar(words: Words) -> torch.Tensor:
        radius = torch.sqrt(-2 * torch.log1p(-_fraction(words[0], words[1])))
        return radius * torch.cos(2 * math.pi * _fraction(words[2], words[3]))

    return _drawn(positions, seed, site, step, polar)


def _fraction(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """53 bits of two words as a fraction of one."""
    return ((low >> 5) * (1 << 26) + (high >> 6)).double() * 2.0**-53


def _drawn(
    positions: torch.Tensor, seed: int, site: int, step: int, made: Callable[[Words], torch.Tensor]
) -> torch.Tensor:
    """``made`` of the block of every position: the counter is (position, site, step), the key is the seed."""
    flat = positions.reshape(-1)
    result = torch.empty(flat.shape, dtype=torch.float64, device=flat.device)
    length = CHUNK.get(flat.device.type, LARGE_CHUNK)
    for here, chunk in zip(result.split(length), flat.split(length), strict=True):
        third, fourth = (torch.full_like(chunk, word & MASK) for word in (site, step))
        here.copy_(made(philox((chunk & MASK, chunk >> 32, third, fourth), halves(seed))))
    return result.view(positions.shape)
