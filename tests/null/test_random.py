"""Random numbers by place: the generator, the pieces of every random operator, and their distribution."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from meshwright.compiler.graph import Value
from meshwright.compiler.types import S, Type
from meshwright.passes.drawn import NUM_DRAWN_DIMS
from meshwright.passes.rules import RANDOM_RULES, Call, factors_of
from meshwright.runtime import philox
from meshwright.runtime import random as operators
from meshwright.runtime.groups import Groups
from meshwright.runtime.layout import Split
from meshwright.runtime.random import Draws, Random
from tests.null.simulate import cut

CPU = torch.device("cpu")


def _random(
    exact: bool, *splits: tuple[str, Split], rank: int = 0, site: int = 3, microbatch: int = 0, **state: int
) -> Random:
    """What a rank of dp=2, tp=2 draws from in 3 microbatches."""
    groups = Groups(sizes={"dp": 2, "tp": 2}, rank=rank, device=CPU, microbatches=3, microbatch=microbatch)
    return Random(draws=Draws(groups=groups, exact=exact, **state), site=site, splits=splits)


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((philox.MASK,) * 4, (philox.MASK,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_is_that_of_the_paper(counter: Any, key: Any, block: str) -> None:
    """The known answers of Random123, in ints and in tensors."""
    assert " ".join(f"{word:08x}" for word in philox.philox(counter, key)) == block
    a, b, c, d = (torch.tensor(word) for word in counter)
    words = philox.philox((a, b, c, d), key)
    assert " ".join(f"{int(word):08x}" for word in words) == block


def test_every_element_has_a_block_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.tensor([0, 5, 2**33 + 5, 7])
    first = philox.uniform(positions, seed=2**40 + 1, site=3, step=4)
    monkeypatch.setitem(philox.CHUNK, "cpu", 3)
    assert torch.equal(philox.uniform(positions, seed=2**40 + 1, site=3, step=4), first), "chunks change nothing"
    others = [
        philox.uniform(positions, seed=seed, site=site, step=step)
        for seed, site, step in [(1, 3, 4), (2**40 + 1, 4, 3), (2**40 + 1, 3, 5)]
    ]
    assert torch.cat([first, *others]).unique().numel() == 16


def test_noise_has_its_distribution() -> None:
    """Moments of 2^18 numbers, within five standard errors."""
    positions, count = torch.arange(2**18), 2**18
    u, z = (draw(positions, seed=1, site=2, step=3) for draw in (philox.uniform, philox.normal))
    assert 0 <= u.min() and u.max() < 1
    for sample, mean, deviation in [
        (u, 1 / 2, 1 / math.sqrt(12)),
        (u**2, 1 / 3, math.sqrt(4 / 45)),
        (z, 0.0, 1.0),
        (z**2, 1.0, math.sqrt(2)),
        (z**4, 3.0, math.sqrt(96)),
        (u[1:] * u[:-1], 1 / 4, math.sqrt(7 / 144)),
    ]:
        assert abs(sample.mean().item() - mean) < 5 * deviation / math.sqrt(count)


# Pieces


@pytest.mark.parametrize(
    "types",
    [
        {"dp": S(0), "mb": S(0), "tp": S(1)},
        {"dp": S(0), "tp": S(1, 3)},
        {"tp": S(0)},
        {"dp": S(0), "mb": S(0), "tp": S(0, 2)},
        {},
    ],
    ids=str,
)
def test_pieces_have_the_positions_of_the_whole(types: dict[str, Type]) -> None:
    whole = torch.arange(24 * 12 * 2).view(24, 12, 2)
    splits = tuple((axis, Split(type_.dim, int(type_.groups))) for axis, type_ in types.items())
    sizes = {"dp": 2, "mb": 3, "tp": 2}
    for rank in range(4):
        for microbatch in range(3):
            random = _random(True, *splits, rank=rank, microbatch=microbatch)
            piece = cut(whole, types, {"dp": rank // 2, "mb": microbatch, "tp": rank % 2}, sizes)
            assert torch.equal(random.positions(piece.shape, CPU), piece)


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    operators.dropout: ((_x(4, 6, 8), 0.3, True), {}),
    operators.feature_dropout: ((_x(4, 6, 8), 0.3, True), {}),
    operators.alpha_dropout: ((_x(4, 6, 8), 0.3, True), {}),
    operators.feature_alpha_dropout: ((_x(4, 6, 8), 0.3, True), {}),
    operators.attention_with_dropout: (
        (_x(2, 4, 6, 8), _x(2, 2, 6, 8), _x(2, 2, 6, 8), 0.3, True),
        {"attn_mask": _x(2, 1, 6, 6), "enable_gqa": True},
    ),
    operators.rand_like: ((_x(4, 6),), {}),
    operators.randn_like: ((_x(4, 6),), {}),
    operators.rand: (((4, 6),), {"dtype": torch.float64, "device": CPU}),
    operators.randn: (((4, 6),), {"dtype": torch.float64, "device": CPU}),
}


@pytest.mark.parametrize("operator", RANDOM_RULES, ids=lambda operator: operator.__name__)
def test_pieces_are_drawn_as_the_whole_is(operator: Any) -> None:
    """The proof of a rule by brute force: on every split that it promises, both pieces against the whole."""
    args, kwargs = CASES[operator]
    whole = operator(*args, _random(True), **kwargs)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    site = Value(shape=(), dtype=torch.int64, grad=False, made_of="inputs")
    values = [Value(shape=tuple(t.shape), dtype=t.dtype, grad=True, made_of="data") for t in (*tensors, whole)]
    masks = sum(isinstance(a, torch.Tensor) for a in kwargs.values())
    placed = [*values[: len(tensors) - masks], site, *values[len(tensors) - masks : -1]]
    call = Call(target=operator, args=args, kwargs=kwargs, operands=tuple(placed), results=(values[-1],))
    factors = factors_of(call, RANDOM_RULES)
    assert factors is not None
    proven = 0
    for factor in factors.factors:
        if factor.whole:
            continue
        at, place = len(tensors) - masks, factor.results[0]
        assert factor.operands[at] is None and place is not None
        places = [*factor.operands[:at], *factor.operands[at + 1 :]]
        count = NUM_DRAWN_DIMS.get(operator, whole.ndim)
        splits = (("tp", Split(place.dim)),) if place.dim in range(whole.ndim)[:count] else ()
        for rank in range(2):
            random = _random(True, *splits, rank=rank)

            def piece(a: Any, where: Any, rank: int = rank) -> Any:
                return a if where is None else a.chunk(2, where.dim)[rank]

            shape = piece(torch.empty(whole.shape), place).shape
            queue = list(places)
            mine = [piece(a, queue.pop(0)) if isinstance(a, torch.Tensor) else a for a in args]
            mine = [shape if isinstance(a, tuple) else a for a in mine]
            named = {k: piece(a, queue.pop(0)) if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
            torch.testing.assert_close(operator(*mine, random, **named), piece(whole, place), rtol=1e-12, atol=1e-12)
        proven += 1
    assert proven >= 2


def test_attention_written_out_is_that_of_torch() -> None:
    """Without anything dropped: masks of both kinds, a row without anything to attend to, causal, grouped heads."""
    query, key, value = _x(2, 4, 6, 8), _x(2, 2, 6, 8), _x(2, 2, 6, 8)
    mask = _x(2, 1, 6, 6) > -0.5
    mask[0, 0, 2] = False
    for options in ({"attn_mask": mask}, {"attn_mask": _x(6, 6)}, {"is_causal": True, "scale": 0.7}):
        wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
        got = operators.attention_with_dropout(
            query,
            key,
            value,
            0.0,
            True,
            _random(True),
            enable_gqa=True,
            **options,
        )
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


# Fast: torch's generator, seeded for each piece


def _mask(random: Random) -> torch.Tensor:
    return operators.dropout(torch.ones(64, 64), 0.25, True, random) > 0


def test_fast_pieces_differ_and_replicas_agree() -> None:
    batch, features = ("dp", Split(0)), ("tp", Split(1))
    drawn = {rank: _mask(_random(False, batch, rank=rank)) for rank in range(4)}
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3]), "tp ranks have the same piece"
    splits = (batch, ("mb", Split(0)), features)
    different = [
        *(_mask(_random(False, *splits, rank=rank)) for rank in range(4)),
        *(_mask(_random(False, *splits, microbatch=microbatch)) for microbatch in (1, 2)),
        _mask(_random(False, *splits, step=1)),
        _mask(_random(False, *splits, seed=1)),
        _mask(_random(False, *splits, site=4)),
    ]
    count = 64 * 64
    for i, mask in enumerate(different):
        # Kept with probability 3/4, and independently of what any other piece, step, seed and site keeps.
        assert abs(mask.double().mean().item() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / count)
        for other in different[:i]:
            agreement = (mask == other).double().mean().item()
            assert abs(agreement - 0.625) < 5 * math.sqrt(0.625 * 0.375 / count)


def test_fast_keeps_its_mean_and_the_generator_of_others() -> None:
    before = torch.get_rng_state()
    random = _random(False, ("dp", Split(0)))
    dropped = operators.dropout(torch.ones(512, 512), 0.25, True, random)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(dropped.mean().item() - 1) < 5 * math.sqrt(1 / 3) / 512
    assert torch.equal(operators.dropout(torch.ones(512, 512), 0.25, True, random), dropped), "recomputation repeats it"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("exact", [True, False])
def test_recomputed_activations_have_the_same_mask(exact: bool) -> None:
    x = torch.ones(32, 32, requires_grad=True)
    random = _random(exact, ("mb", Split(0)), microbatch=1)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: operators.dropout(x * x, 0.5, True, random) ** 2, x, use_reentrant=False, preserve_rng_state=False
    )
    random.draws.groups.microbatch = 2
    operators.dropout(x, 0.5, True, random)  # the next microbatch goes forward before this one goes back
    random.draws.groups.microbatch = 1
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 4 * y.detach())


@pytest.mark.parametrize("operator", [op for op in CASES if "dropout" in op.__name__], ids=lambda op: op.__name__)
def test_evaluation_drops_nothing(operator: Any) -> None:
    args, kwargs = CASES[operator]
    args = tuple(False if a is True else a for a in args)
    got = operator(*args, _random(True), **kwargs)
    whole = F.scaled_dot_product_attention(*args[:3], **kwargs) if len(args) > 3 else args[0]
    assert torch.equal(got, whole)
