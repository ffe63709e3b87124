"""Every conversion keeps the value, and its backward keeps the gradient: each row of the table, over 2 and 3 ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from meshwright.runtime import (
    PlanError,
    all_gather,
    all_reduce,
    all_to_all,
    invariant_to_replicated,
    part_of_mean,
    reduce_scatter,
    replicated_to_partial,
    shard,
    shard_range,
)
from meshwright.runtime.groups import Groups, start, using
from meshwright.runtime.layout import Piece, Split, parse, piece_of
from tests.gloo.pool import Pool

pytestmark = pytest.mark.gloo

SHAPE = (6, 12, 7)
GRADIENT = {"R": "P", "I": "I", "P": "R"}
"""Type of a value -> type of its gradient; S(d) -> S(d)."""

ROWS: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "I -> R": ("I", "R", lambda x: invariant_to_replicated(x, "tp")),
    "R -> P": ("R", "P", lambda x: replicated_to_partial(x, "tp")),
    "P -> I": ("P", "I", lambda x: all_reduce(x, "tp")),
    "P -> R": ("P", "R", lambda x: invariant_to_replicated(all_reduce(x, "tp"), "tp")),
    "S(0) -> R": ("S(0)", "R", lambda x: all_gather(x, "tp", dim=0, to="R")),
    "S(1) -> R": ("S(1)", "R", lambda x: all_gather(x, "tp", dim=-2, to="R")),
    "S(1/2) -> R": ("S(1/2)", "R", lambda x: all_gather(x, "tp", dim=1, to="R", groups=2)),
    "S(0) -> I": ("S(0)", "I", lambda x: all_gather(x, "tp", dim=0, to="I")),
    "S(1/2) -> I": ("S(1/2)", "I", lambda x: all_gather(x, "tp", dim=1, to="I", groups=2)),
    "I -> S(1)": ("I", "S(1)", lambda x: shard(x, "tp", dim=1, of="I")),
    "I -> S(1/2)": ("I", "S(1/2)", lambda x: shard(x, "tp", dim=-2, of="I", groups=2)),
    "R -> S(0)": ("R", "S(0)", lambda x: shard(x, "tp", dim=0, of="R")),
    "R -> S(1/2)": ("R", "S(1/2)", lambda x: shard(x, "tp", dim=1, of="R", groups=2)),
    "P -> S(0)": ("P", "S(0)", lambda x: reduce_scatter(x, "tp", dim=0)),
    "P -> S(1)": ("P", "S(1)", lambda x: reduce_scatter(x, "tp", dim=-2)),
    "P -> S(1/2)": ("P", "S(1/2)", lambda x: reduce_scatter(x, "tp", dim=1, groups=2)),
    "S(2) -> R, uneven": ("S(2)", "R", lambda x: all_gather(x, "tp", dim=2, to="R", size=7)),
    "S(2) -> I, uneven": ("S(2)", "I", lambda x: all_gather(x, "tp", dim=-1, to="I", size=7)),
    "I -> S(2), uneven": ("I", "S(2)", lambda x: shard(x, "tp", dim=-1, of="I", size=7)),
    "R -> S(2), uneven": ("R", "S(2)", lambda x: shard(x, "tp", dim=2, of="R", size=7)),
    "P -> S(2), uneven": ("P", "S(2)", lambda x: reduce_scatter(x, "tp", dim=2, size=7)),
    "S(0) -> S(1)": ("S(0)", "S(1)", lambda x: all_to_all(x, "tp", split_dim=1, concat_dim=0)),
    "S(1) -> S(0)": ("S(1)", "S(0)", lambda x: all_to_all(x, "tp", split_dim=0, concat_dim=-2)),
}


def _groups(ranks: int) -> Groups:
    groups = start({"tp": ranks}, 1, "cpu")
    groups.make(["tp"])
    return groups


def _piece(type_: str, groups: Groups) -> Piece:
    used = parse(type_)[1]
    types = {"tp": used} if isinstance(used, Split) else {}
    return piece_of(SHAPE, None, types, groups.coordinates, groups.sizes)


def _local(whole: torch.Tensor, type_: str, groups: Groups) -> torch.Tensor:
    """What this rank holds of a value of this type."""
    if type_ != "P":
        return _piece(type_, groups).cut(whole).clone()
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(groups.size("tp") - 1)]
    return [*parts, whole - sum(parts)][groups.rank]


def _assert_is(local: torch.Tensor, whole: torch.Tensor, type_: str, groups: Groups) -> None:
    """What the ranks hold together is ``whole``."""
    if type_ == "P":
        local = local.clone()
        groups.wire.world.begin_all_reduce(local)()
    torch.testing.assert_close(local, _piece(type_, groups).cut(whole), rtol=1e-12, atol=1e-12)


def convert_all(ranks: int) -> list[str]:
    """On every rank: all rows."""
    groups = _groups(ranks)
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    gradient = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    for before, after, convert in ROWS.values():
        x = _local(whole, before, groups).requires_grad_()
        kept = x.detach().clone()
        with using(groups):
            y = convert(x)
        _assert_is(y.detach(), whole, after, groups)
        y.backward(_local(gradient, GRADIENT.get(after, after), groups))
        assert x.grad is not None
        _assert_is(x.grad, gradient, GRADIENT.get(before, before), groups)
        assert torch.equal(x.detach(), kept), "a conversion leaves its input alone"
    return list(ROWS)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_row_of_the_table(ranks: int, pool: Pool) -> None:
    assert pool.run("tests.gloo.test_collectives:convert_all", (ranks,), ranks=ranks) == [list(ROWS)] * ranks


def convert_integers(ranks: int) -> Any:
    with using(_groups(ranks)) as groups:
        counts = torch.tensor([groups.rank, 1])
        assert all_reduce(counts, "tp").tolist() == [sum(range(ranks)), ranks]
        assert all_gather(counts, "tp", dim=0, to="R").tolist() == [n for k in range(ranks) for n in (k, 1)]
        mask = torch.tensor([groups.rank == 1])
        assert all_gather(mask, "tp", dim=0, to="I").tolist() == [k == 1 for k in range(ranks)]
        assert shard(torch.arange(2 * ranks), "tp", dim=0, of="I").tolist() == [2 * groups.rank, 2 * groups.rank + 1]
        assert all_reduce(torch.tensor(3), "tp").item() == 3 * ranks
        with pytest.raises(TypeError, match="a boolean tensor cannot be summed over tp"):
            all_reduce(mask, "tp")
        with pytest.raises(PlanError) as error:
            shard(torch.arange(2 * ranks + 1), "tp", dim=0, of="I")
        with pytest.raises(PlanError, match=r"^dim 0 of \(5,\) is to be cut over tp as if it were 7 long$"):
            shard(torch.arange(5), "tp", dim=0, of="I", size=7)
        with pytest.raises(PlanError, match=r"^dim 0 of \(5,\) is not this rank's \d of 7$"):
            all_gather(torch.arange(5), "tp", dim=0, to="I", size=7)
        return str(error.value), shard_range(7, "tp"), part_of_mean(torch.tensor(6.0), "tp", "mb").item()


def test_integers_pass_and_uneven_pieces_do_not_unless_told(pool: Pool) -> None:
    results = pool.run("tests.gloo.test_collectives:convert_integers", (2,), ranks=2)
    message = "cannot cut dim 0 of (5,) in 2 equal pieces over tp\n  use a size that is a multiple of 2"
    assert results == [(message, (0, 4), 3.0), (message, (4, 7), 3.0)]


def test_an_axis_of_one_rank_or_none_is_the_identity() -> None:
    x = torch.randn(3, 5)
    with using(start({"tp": 1}, 1, "cpu")):
        for axis in ("tp", "cp"):
            for result in (
                invariant_to_replicated(x, axis),
                all_reduce(x, axis),
                all_gather(x, axis, dim=0, to="R"),
                reduce_scatter(x, axis, dim=0),
                shard(x, axis, dim=0, of="R"),
                all_to_all(x, axis, split_dim=0, concat_dim=1),
            ):
                assert result is x
            assert shard_range(7, axis) == (0, 7)
            assert replicated_to_partial(x, axis).equal(x)
        assert part_of_mean(x, "tp", "cp").equal(x)


def test_outside_a_trainer_there_is_no_mesh() -> None:
    with pytest.raises(PlanError, match="a collective of a stage file was called outside a Trainer"):
        all_reduce(torch.ones(1), "tp")
