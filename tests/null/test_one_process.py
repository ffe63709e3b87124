"""All ranks as threads of one process: exact, in turns, and an error where ranks would wait for ever."""

import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from meshwright.runtime import BundleError, PlanError, RankError, Trainer, all_reduce, run_in_one_process
from meshwright.runtime.groups import Groups, num_ranks, start, using
from tests.gloo import bundles, test_bundles, test_collectives

ALL = {"dp": 2, "pp": 2, "tp": 2}
IMPORT = "from meshwright.runtime import all_reduce, invariant_to_replicated"
SUM = 'all_reduce(hidden, "tp") + self.bias'


def train(bundle: Path, mesh: dict[str, int], optimizer: str = "sgd", size: int = 12) -> list[dict[str, Any]]:
    """What every rank of the bundle returns."""
    return run_in_one_process(lambda rank: test_bundles.train(str(bundle), optimizer, size), num_ranks(mesh))


@pytest.mark.parametrize(("mesh", "plan", "optimizer", "size"), test_bundles.CASES, ids=str)
def test_equals_one_device(
    mesh: dict[str, int], plan: dict[str, Any], optimizer: str, size: int, tmp_path: Path
) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", mesh, **plan)
    wanted = test_bundles.reference(optimizer, size)
    for got in train(bundle, mesh, optimizer, size):
        test_bundles.assert_equal(got, wanted)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_row_of_the_table(ranks: int) -> None:
    rows = list(test_collectives.ROWS)
    assert run_in_one_process(lambda rank: test_collectives.convert_all(ranks), ranks) == [rows] * ranks
    run_in_one_process(lambda rank: test_collectives.convert_integers(ranks), ranks)


def test_complex_values() -> None:
    def add(rank: int) -> torch.Tensor:
        with using(_groups({"tp": 2})):
            return all_reduce(torch.tensor([1 + 2j, rank]), "tp")

    assert all(one.tolist() == [2 + 4j, 1] for one in run_in_one_process(add, 2))


def test_a_collective_fills_what_autograd_saved_as_a_wire_does() -> None:
    def call(rank: int) -> list[float]:
        flat, x = torch.ones(2), torch.ones(2, requires_grad=True)
        y = x * flat
        _groups({"tp": 2}).group(["tp"]).begin_all_reduce(flat)()
        y.sum().backward()
        assert x.grad is not None
        return x.grad.tolist()

    assert run_in_one_process(call, 2) == [[2.0, 2.0]] * 2


def test_the_same_bits_in_every_run(tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", {**ALL, "dp": 3}, zero=2, microbatches=2)
    first, again = train(bundle, {**ALL, "dp": 3}), train(bundle, {**ALL, "dp": 3})
    assert first[0]["losses"] == again[0]["losses"]
    for a, b in zip(first[0]["gradients"], again[0]["gradients"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_checkpoint_continues_exactly(zero: int, tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", ALL, zero=zero, microbatches=3)
    arguments = (str(bundle), str(tmp_path / "saved"))
    for straight, resumed, steps in run_in_one_process(lambda rank: test_bundles.continue_training(*arguments), 8):
        assert straight == resumed and steps == 3


def test_one_rank_at_a_time_until_it_waits() -> None:
    def call(rank: int) -> None:
        groups = _groups({"tp": 3})
        for turn in range(2):
            seen.append((turn, rank))
            groups.group(["tp"]).summed(torch.ones(1))

    seen: list[tuple[int, int]] = []
    run_in_one_process(call, 3)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 0), (1, 1)]


def test_every_rank_has_random_generators_of_its_own() -> None:
    def draw(rank: int) -> list[float]:
        groups = _groups({"tp": 2})
        torch.manual_seed(3)
        random.seed(3)
        numpy.random.seed(3)
        numbers = []
        for _ in range(2):
            numbers += [torch.rand(()).item(), random.random(), float(numpy.random.rand())]
            groups.group(["tp"]).summed(torch.ones(1))
        return numbers

    before = torch.get_rng_state(), random.getstate()
    first, second = run_in_one_process(draw, 2)
    assert first == second == draw_alone()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def draw_alone() -> list[float]:
    """Two draws of each generator from the seed 3, leaving those of the process as they were."""
    other, numbers = random.Random(3), numpy.random.RandomState(3)
    generator = torch.Generator().manual_seed(3)
    return [x for _ in range(2) for x in (torch.rand((), generator=generator).item(), other.random(), numbers.rand())]


# What goes wrong


def _groups(mesh: dict[str, int]) -> Groups:
    groups = start(mesh, 1, "cpu")
    for axis in mesh:
        groups.make([axis])
    return groups


def _failure(function: Callable[[int], Any], ranks: int) -> str:
    with pytest.raises(RankError) as error:
        run_in_one_process(function, ranks)
    return str(error.value)


def test_a_deadlock_says_what_every_rank_waits_for() -> None:
    def call(rank: int) -> None:
        groups = _groups({"pp": 2, "tp": 2})
        if rank == 0:
            groups.group(["tp"]).summed(torch.ones(3, 5))
        elif rank == 1:
            groups.group(["pp"]).begin_exchange([], [(3, torch.ones(2))])[1][0]()
        elif rank == 2:
            groups.group(["pp"]).begin_exchange([(0, torch.ones(7, dtype=torch.int64))], [])[0][0]()

    first = call.__code__.co_firstlineno
    assert _failure(call, 4) == (
        "deadlock: no rank can go on\n"
        f"  rank 0 waits for rank 1 in all_reduce of (3, 5) float32 at test_one_process.py:{first + 3} "
        "over tp (ranks 0, 1)\n"
        f"  rank 1 waits for a message of (2,) float32 from rank 3 at test_one_process.py:{first + 5}\n"
        f"  rank 2 waits for rank 0 to receive (7,) int64 at test_one_process.py:{first + 7}\n"
        "  rank 3 has ended"
    )


def test_collectives_that_do_not_fit_say_both() -> None:
    def call(rank: int) -> None:
        group = _groups({"tp": 3}).group(["tp"])
        group.summed(torch.ones(2))
        if rank == 1:
            group.begin_all_gather(torch.empty(6), torch.ones(2))()
        else:
            group.summed(torch.ones(2))

    first = call.__code__.co_firstlineno
    assert _failure(call, 3) == (
        "ranks 2 and 1 do not agree on a collective over tp (ranks 0, 1, 2)\n"
        f"  rank 2 calls all_reduce of (2,) float32 at test_one_process.py:{first + 6}\n"
        f"  rank 1 calls all_gather of (2,) float32 at test_one_process.py:{first + 4}"
    )


def test_messages_that_do_not_fit_say_both() -> None:
    def call(rank: int) -> None:
        group = _groups({"pp": 2}).group(["pp"])
        mine = torch.ones(2, 3 + rank)
        group.begin_exchange([(1, mine)] if rank == 0 else [], [(0, mine)] if rank else [])

    line = call.__code__.co_firstlineno + 3
    assert _failure(call, 2) == (
        f"rank 0 sends (2, 3) float32 at test_one_process.py:{line}, "
        f"rank 1 receives (2, 4) float32 at test_one_process.py:{line}"
    )


def test_a_collective_that_one_rank_leaves_out_is_found_in_a_program(tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", ALL, microbatches=2)
    test_bundles.edit(bundle, 0, IMPORT, f"{IMPORT}\nfrom meshwright.runtime.groups import current")
    test_bundles.edit(bundle, 0, SUM, f"(hidden if current().rank == 1 else {SUM})")
    with pytest.raises(RankError) as error:
        train(bundle, ALL)
    text = str(error.value)
    assert text.startswith("rank 0 failed in 0F0 forward of stage 0, microbatch 0: RankError: deadlock: no rank can go")
    assert "rank 0 waits for rank 1 in all_reduce of (3, 6) float64 at stage_0.py:22 over tp (ranks 0, 1)" in text
    assert "rank 2 waits for a message of (3, 6) float64 from rank 0 at test_bundles.py:" in text
    assert all(f"rank {rank} waits for " in text for rank in range(8))


def test_the_first_failure_is_raised_as_it_was_and_the_others_end() -> None:
    def call(rank: int) -> None:
        groups = _groups({"tp": 3})
        try:
            if rank == 1:
                raise KeyError("a bad batch")
            groups.group(["tp"]).summed(torch.ones(1))
        except Exception:
            ended.append(rank)
            raise
        finally:
            left.append(rank)

    ended: list[int] = []
    left: list[int] = []
    with pytest.raises(KeyError, match="a bad batch") as error:
        run_in_one_process(call, 3)
    assert error.value.__notes__ == ["on rank 1"]
    assert "raise KeyError" in "".join(traceback.format_exception(error.value))
    assert ended == [1] and left == [1, 0], "rank 0 waits, and rank 2 did not begin"


def test_what_fails_because_another_rank_failed_is_not_the_reason() -> None:
    def call(rank: int) -> None:
        groups = _groups({"tp": 2})
        if rank == 1:
            raise KeyError("a bad batch")
        try:
            groups.group(["tp"]).summed(torch.ones(1))
        finally:
            raise ValueError("while cleaning up")

    with pytest.raises(KeyError, match="a bad batch"):
        run_in_one_process(call, 2)


@pytest.mark.parametrize("case", test_bundles.FAILURES)
def test_a_rank_that_fails_ends_all(case: str, tmp_path: Path) -> None:
    mesh, old, new, message = test_bundles.FAILURES[case]
    bundle = bundles.write_bundle(tmp_path / "bundle", mesh, microbatches=2)
    test_bundles.edit(bundle, mesh.get("pp", 1) - 1, old, new)
    kind, _, text = message.partition(": ")
    with pytest.raises({"RankError": RankError, "BundleError": BundleError}[kind]) as error:
        train(bundle, mesh)
    assert str(error.value).startswith(text)


def test_a_failure_that_a_script_survives_is_raised_all_the_same(tmp_path: Path) -> None:
    def call(rank: int) -> None:
        trainer = Trainer(bundle, optimizer=test_bundles.OPTIMIZERS["sgd"], device="cpu")
        try:
            trainer.step(trainer.shard(bundles.batch()))
        except RankError:
            survived.append(rank)

    survived: list[int] = []
    bundle = bundles.write_bundle(tmp_path / "bundle", {"dp": 2})
    test_bundles.edit(bundle, 0, "        skip = ", "        raise ValueError('no')\n        skip = ")
    assert _failure(call, 2) == "rank 1 failed in 0F0 forward of stage 0, microbatch 0: ValueError: no"
    assert survived == [1], "rank 0 waited for it, and did not go on"


def test_a_failure_in_a_backward_ends_ranks_that_wait_in_theirs(tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", {"tp": 2, "dp": 2})
    test_bundles.edit(bundle, 0, IMPORT, f"{IMPORT}\nfrom meshwright.runtime.groups import current")
    test_bundles.edit(
        bundle,
        0,
        "        hidden = skip\n",
        "        hidden = skip * 1\n"
        "        if current().rank == 2:\n"
        "            hidden.register_hook(lambda _: 1 / 0)\n",
    )
    with pytest.raises(RankError, match="^rank 2 failed in 0B0 backward .*: ZeroDivisionError: division by zero$"):
        train(bundle, {"tp": 2, "dp": 2})


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    bundle = bundles.write_bundle(tmp_path / "bundle", {"dp": 2})
    with pytest.raises(PlanError) as error:
        run_in_one_process(lambda rank: test_bundles.train(str(bundle), "sgd", 12), 3)
    assert str(error.value) == (
        "the bundle is for 2 ranks (dp=2) and was launched with 3\n  run_in_one_process(function, num_ranks=2)"
    )


def test_ranks_do_not_have_ranks() -> None:
    with pytest.raises(PlanError, match="^run_in_one_process was called on a rank of run_in_one_process"):
        run_in_one_process(lambda rank: run_in_one_process(str, 2), 2)


def test_another_debugger_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[int] = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stopped.append(1))
    run_in_one_process(lambda rank: breakpoint(), 2)
    assert stopped == [1, 1]
