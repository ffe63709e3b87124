"""ZeRO-2 and 3 in pipelines: exact in every kind of schedule, with the collectives and the memory that were chosen."""

import functools
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.runtime import Trainer, run_in_one_process
from meshwright.runtime.buckets import gather_in_modules
from meshwright.runtime.flat import flatten
from meshwright.runtime.gathered import Gathered, Uses
from meshwright.runtime.groups import current, start
from meshwright.runtime.meetings import ThreadGroup
from meshwright.runtime.units import SplitGradients
from tests.gloo import bundles, parity, test_bundles
from tests.gloo.pool import OneProcess
from tests.gloo.test_schedules import WIDTH, batch, tower

MESH = {"dp": 2, "pp": 2}
SCHEDULES = ("1f1b", "interleaved", "zb-h1", "zbv")
SIZE = 16


def partly_frozen() -> nn.Module:
    """The tower, with a tied weight, and modules that are frozen whole, in part and not at all."""
    model = tower()
    model.layers[1].requires_grad_(False)
    for name in ("layers.2.linear.bias", "layers.5.norm.weight"):
        model.get_parameter(name).requires_grad_(False)
    return model


class Reader(nn.Module):
    """A block that mixes two values, each through a matrix of its own: their gradients come one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.own(torch.tanh(x))) * torch.tanh(self.other(memory))


class Readers(nn.Module):
    """Every block reads what the first layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Reader() for _ in range(4))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory = torch.tanh(self.first(x))
        for layer in self.layers:
            x = layer(x, memory)
        return (x - target).pow(2).mean()


def readers() -> nn.Module:
    torch.manual_seed(0)
    return Readers()


MODELS = {"partly frozen": partly_frozen, "readers": readers}


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return parity.reference(MODELS[name](), batch(SIZE))


@pytest.mark.parametrize(
    ("name", "schedule", "zero", "reshard"),
    [
        *itertools.product(["partly frozen"], SCHEDULES, [2, 3], ["step", "microbatch"]),
        *itertools.product(["readers"], ["1f1b", "zb-h1"], [3], ["step", "microbatch"]),
    ],
)
def test_equals_one_device(
    name: str, schedule: str, zero: int, reshard: str, threads: OneProcess, tmp_path: Path
) -> None:
    plan = {"schedule": schedule, "zero": zero, "reshard": reshard, "microbatches": 4}
    parity.emit_case(tmp_path / "bundle", MODELS[name](), batch(SIZE), MESH, plan)
    got = threads.run("tests.gloo.parity:train", (str(tmp_path / "bundle"), batch(SIZE)), ranks=4)
    parity.compare(got, reference(name))


def count(bundle: str) -> tuple[list[float], int]:
    """Gathers and reductions of a second step, per unit; and what is held whole after it, in bytes or tensors."""
    trainer = Trainer(bundle, optimizer=torch.optim.SGD, device="cpu")
    part = trainer.shard(parity.doubled(batch(SIZE)))
    trainer.step(part)
    before = Counter(CALLS[trainer.rank])
    trainer.step(part)
    calls = Counter(CALLS[trainer.rank])
    calls.subtract(before)
    units = [unit for unit in trainer.units if isinstance(unit, SplitGradients)]
    gathered = [*(unit.gathered for unit in units if unit.gathered), *(one for _, one in trainer.frozen)]
    assert units and (gathered or trainer.manifest["plan"]["zero"] == 2)
    left = sum(one.flat.untyped_storage().nbytes() for one in gathered)
    left += sum(unit.whole is not None for unit in units)
    left += sum(held.parameter.grad is not None for unit in units for held in unit.held)
    gathers = calls["begin_all_gather"] / len(gathered or units)
    return [gathers, calls["begin_reduce_scatter"] / len(units)], left


CALLS: dict[int, Counter[str]] = {}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of collectives are counted by rank, in ``CALLS``."""
    CALLS.clear()
    for name in ("begin_all_gather", "begin_reduce_scatter"):
        monkeypatch.setattr(ThreadGroup, name, _counting(name, getattr(ThreadGroup, name)))


def _counting(name: str, run: Any) -> Any:
    def call(group: ThreadGroup, *args: torch.Tensor) -> Any:
        CALLS.setdefault(group.rank, Counter())[name] += 1
        return run(group, *args)

    return call


COUNTS: list[tuple[dict[str, Any], list[float]]] = [
    # gathers and reductions of a unit in a step
    ({"zero": 2, "microbatches": 4}, [1, 1]),  # parameters after the optimizer's step
    ({"zero": 3, "microbatches": 2}, [1, 1]),
    ({"zero": 3, "microbatches": 4}, [1, 1]),
    ({"zero": 3, "microbatches": 4, "schedule": "zb-h1"}, [1, 1]),
    ({"zero": 3, "microbatches": 4, "schedule": "interleaved"}, [1, 1]),
    ({"zero": 2, "microbatches": 4, "reshard": "microbatch"}, [1, 4]),
    ({"zero": 2, "microbatches": 4, "reshard": "microbatch", "schedule": "zb-h1"}, [1, 4]),
]


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("plan", "expected"), COUNTS, ids=str)
def test_collectives_of_a_step_and_what_is_left_whole(
    plan: dict[str, Any], expected: list[float], threads: OneProcess, tmp_path: Path
) -> None:
    parity.emit_case(tmp_path / "bundle", readers(), batch(SIZE), MESH, plan)
    got = threads.run("tests.gloo.test_zero_in_pipelines:count", (str(tmp_path / "bundle"),), ranks=4)
    assert got == [(expected, 0)] * 4


@pytest.mark.usefixtures("counted")
def test_gathered_for_each_use(threads: OneProcess, tmp_path: Path) -> None:
    """Forward, I and W, but for what stays from one to the next."""
    plan = {"zero": 3, "microbatches": 4, "schedule": "zb-h1", "reshard": "microbatch"}
    parity.emit_case(tmp_path / "bundle", readers(), batch(SIZE), MESH, plan)
    for (gathers, reductions), left in threads.run(
        "tests.gloo.test_zero_in_pipelines:count", (str(tmp_path / "bundle"),), ranks=4
    ):
        assert 2 * 4 < gathers <= 3 * 4 and reductions == 4 and left == 0


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved"])
@pytest.mark.parametrize("zero", [2, 3])
def test_a_reduction_begins_inside_the_last_backward(
    zero: int, schedule: str, monkeypatch: pytest.MonkeyPatch, threads: OneProcess, tmp_path: Path
) -> None:
    """What remains of the step is computed beside it."""
    reductions = ThreadGroup.begin_reduce_scatter
    begun: set[tuple[bool, int]] = set()

    def begin(group: ThreadGroup, *args: torch.Tensor) -> Any:
        begun.add((torch._C._current_graph_task_id() >= 0, current().microbatch))
        return reductions(group, *args)

    monkeypatch.setattr(ThreadGroup, "begin_reduce_scatter", begin)
    plan = {"zero": zero, "microbatches": 4, "schedule": schedule}
    parity.emit_case(tmp_path / "bundle", readers(), batch(SIZE), MESH, plan)
    threads.run("tests.gloo.parity:train", (str(tmp_path / "bundle"), batch(SIZE), 1), ranks=4)
    assert begun == {(True, 3)}


def test_a_backward_for_the_weights_gathers_all_beside_each_other() -> None:
    def call(rank: int) -> tuple[list[bool], list[bool], list[bool]]:
        groups = start({"dp": 2}, 1, "cpu")
        groups.make(["dp"])
        some = [Gathered(torch.ones(4), groups, stages) for stages in ([0], [0, 1], [1], [0])]
        uses, gather = Uses(some, stay=False), some[0].gather
        seen: list[bool] = []

        def first() -> None:
            seen.extend(one.finish is not None for one in some)
            gather()

        some[0].gather = first  # type: ignore[method-assign]
        uses.begin("training")
        uses.hold(0)
        for one in some:
            one.drop()  # a unit has its gradients and lets go; others may need the values still
        held = [one.is_whole for one in some]
        uses.let_go(0)
        uses.end_backward(0, last=False)
        return seen, held, [one.is_whole for one in some]

    wanted = [True, True, False, True]
    assert run_in_one_process(call, 2) == [(wanted, wanted, [False] * 4)] * 2


def test_a_stage_frees_its_parameters_after_its_last_backward(threads: OneProcess, tmp_path: Path) -> None:
    """In an interleaved pipeline the later chunk is done while the earlier one goes on."""
    plan = {"zero": 3, "microbatches": 4, "schedule": "interleaved"}
    parity.emit_case(tmp_path / "bundle", partly_frozen(), batch(SIZE), MESH, plan)
    for whole in threads.run("tests.gloo.test_zero_in_pipelines:watch", (str(tmp_path / "bundle"),), ranks=4):
        first, second = sorted(whole)
        assert whole[second] == [True] * 3 + [False] and whole[first] == [True] * 3 + [False]


@pytest.mark.parametrize("reshard", ["step", "microbatch"])
def test_a_parameter_that_one_microbatch_does_not_reach(reshard: str, threads: OneProcess, tmp_path: Path) -> None:
    """Where a stage file is edited so: what the other microbatches left is reduced all the same."""
    got: list[Any] = []
    for zero in (0, 2):
        bundle = bundles.write_bundle(tmp_path / f"zero-{zero}", {"dp": 2}, zero=zero, microbatches=3)
        test_bundles.edit(bundle, 0, "* self.scale", "* (self.scale if current().microbatch == 1 else 1.5)")
        test_bundles.edit(bundle, 0, "from torch import nn\n", IMPORT)
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["plan"]["reshard"] = reshard
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        got += threads.run("tests.gloo.test_bundles:train", (str(bundle), "adamw", 12), ranks=2)
    test_bundles.assert_equal(got[2], got[0])


IMPORT = "from torch import nn\nfrom meshwright.runtime.groups import current\n"


def watch(bundle: str) -> dict[int, list[bool]]:
    """Stage -> whether some parameters that it alone uses are whole after each of its backwards of a second step."""
    trainer = Trainer(bundle, optimizer=torch.optim.SGD, device="cpu")
    part = trainer.shard(parity.doubled(batch(SIZE)))
    trainer.step(part)
    after = trainer.executor.after_backward
    found: dict[int, list[bool]] = {}

    def watching(stage: int, kind: Any, last: bool) -> None:
        after(stage, kind, last)
        alone = [one for one in trainer._uses.gathered if one.stages == {stage}]
        found.setdefault(stage, []).append(any(one.flat.untyped_storage().nbytes() for one in alone))

    trainer.executor.after_backward = watching
    trainer.step(part)
    return found


class Adder(nn.Module):
    """The gradient of ``x`` is there before the frozen weight is read for that of what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), 0.5), requires_grad=False)
        self.inside = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.inside.weight, 0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inside(torch.ones(3, 4)) @ self.weight)


def test_a_frozen_parameter_stays_until_modules_inside_have_their_gradients() -> None:
    """It was freed with the gradient of the input, and the backward found no storage."""

    def gradient(module: Adder) -> torch.Tensor:
        module(torch.ones(3, 4, requires_grad=True)).sum().backward()
        assert module.inside.weight.grad is not None
        return module.inside.weight.grad

    def call(rank: int) -> torch.Tensor:
        groups, module = start({"dp": 2}, 1, "cpu"), Adder()
        groups.make(["dp"])
        gathered = Gathered(flatten([module.weight], 2), groups, [0])
        unit: Any = SimpleNamespace(held=[SimpleNamespace(parameter=module.inside.weight)], gathered=None, waiting=1)
        module.inside.weight.register_post_accumulate_grad_hook(lambda _: setattr(unit, "waiting", 0))
        frozen: Any = [([SimpleNamespace(parameter=module.weight)], gathered)]
        uses = gather_in_modules(module, [unit], frozen, stay=False)
        uses.begin("training")
        found = gradient(module)
        uses.end()
        return found

    for got in run_in_one_process(call, 2):
        torch.testing.assert_close(got, gradient(Adder()), rtol=0, atol=0)
