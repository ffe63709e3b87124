"""Every schedule trains to the gradients of one device: all numbers of microbatches, with tp and dp beside it, users'
own schedules, and torch's.
"""

import copy
import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshwright import BundleError, Mesh, Plan, PlanError, api, compile_parallel
from meshwright.codegen.bundle import verify_bundle
from meshwright.codegen.steps import step_of
from meshwright.compiler.capture import capture
from meshwright.compiler.graph import Capture
from meshwright.compiler.plan import SCHEDULES
from meshwright.passes.schedules import ALGORITHMS, Compute, Pipeline
from meshwright.runtime import Trainer
from meshwright.runtime.groups import placement_of
from meshwright.runtime.manifest import load_manifest
from tests import models
from tests.gloo import parity
from tests.gloo.pool import Failed, OneProcess, Pool
from tests.null.test_schedule_csv import CLASSES, TRIPLES, Stage, text_of

WIDTH, LAYERS = 6, 8

Case = tuple[dict[str, int], dict[str, Any]]
"""Mesh and plan."""


class Tower(nn.Module):
    """Layers that are hard on a pipeline: a weight of the first is used again by the last, a value skips from the first
    to the last, one linear is used twice in a layer, norms have weights, one parameter is frozen.
    """

    def __init__(self, num_layers: int = LAYERS) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        skip = hidden = torch.tanh(self.first(x))
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.first((hidden + skip) * self.scale)
        return (hidden - target).pow(2).mean()  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(torch.tanh(self.linear(self.norm(x))))  # type: ignore[no-any-return]


def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def batch(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(size, WIDTH, generator=generator) for name in ("x", "target")}


EXAMPLE_SIZE = 27720
"""A multiple of all numbers of microbatches."""
EXAMPLE = batch(EXAMPLE_SIZE)


@functools.cache
def reference(size: int) -> dict[str, Any]:
    return parity.reference(tower(), batch(size), steps=1)


def defined(name: str, num_ranks: int) -> Iterator[tuple[int, int]]:
    """(chunks, microbatches) that a schedule is defined for, from 1 to 3 p microbatches."""
    chunks = ALGORITHMS[name].chunks
    numbers = [chunks] if chunks else [2, 3] if num_ranks == 2 else [2]
    for number, microbatches in itertools.product(numbers, range(1, 3 * num_ranks + 1)):
        if ALGORITHMS[name].undefined(Pipeline.of(num_ranks, microbatches, number)) is None:
            yield number, microbatches


@pytest.fixture(autouse=True, scope="module")
def captured_once() -> Iterator[None]:
    """A model is the same in all cases: its capture takes longer than all else together."""
    known: dict[Any, Capture] = {}

    def once(model: nn.Module, example: Any, **options: Any) -> Capture:
        key = type(model), len(list(model.modules())), options["segment"], options["precision"]
        if key not in known:
            known[key] = capture(model, example, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "capture", once)
        yield


def check(ranks: OneProcess | Pool, mesh: dict[str, int], plan: dict[str, Any], size: int, directory: Path) -> None:
    parity.emit_case(directory, tower(), EXAMPLE, mesh, plan)
    got = ranks.run("tests.gloo.parity:train", (str(directory), batch(size), 1), ranks=parity.num_ranks(mesh))
    parity.compare(got, reference(size))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_of_microbatches(name: str, num_ranks: int, threads: OneProcess, tmp_path: Path) -> None:
    cases = list(defined(name, num_ranks))
    assert cases
    for number, microbatches in cases:
        plan = {"schedule": name, "stages_per_rank": number, "microbatches": microbatches}
        check(threads, {"pp": num_ranks}, plan, 2 * microbatches, tmp_path / f"{number}-{microbatches}")


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_data_and_tensor_parallelism_beside(name: str, threads: OneProcess, tmp_path: Path) -> None:
    plan = {"schedule": name, "microbatches": 4}
    check(threads, {"dp": 2, "pp": 2, "tp": 2}, {**plan, "zero": 1}, 16, tmp_path / "3d")


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        ({}, "zb-h1"),
        ({"max_activation_bytes": 1400.0 * EXAMPLE_SIZE / 16}, "v-min"),
        ({"stages_per_rank": 2}, "interleaved-zb"),
    ],
)
def test_auto(choices: dict[str, Any], name: str, threads: OneProcess, tmp_path: Path) -> None:
    """It chooses one of the schedules by name, and that trains as ever."""
    check(threads, {"pp": 4}, {"schedule": "auto", "microbatches": 8, **choices}, 16, tmp_path / "bundle")
    plan = json.loads((tmp_path / "bundle/manifest.json").read_text())["plan"]
    assert (plan["schedule"], plan["auto"]) == (name, True)


def own(pipeline: Pipeline) -> list[list[Compute]]:
    """A user's schedule, on two ranks: all forwards, then the backwards from the last microbatch on."""
    number = pipeline.num_microbatches
    return [
        [Compute("F", rank, m) for m in range(number)] + [Compute("B", rank, m) for m in reversed(range(number))]
        for rank in range(pipeline.num_ranks)
    ]


def test_a_function_of_the_user(threads: OneProcess, tmp_path: Path) -> None:
    check(threads, {"pp": 2}, {"schedule": own, "microbatches": 3}, 6, tmp_path / "bundle")


def upwards(pipeline: Pipeline) -> list[list[Compute]]:
    """The first stage on the last rank."""
    return own(pipeline)[::-1]


def test_a_function_of_the_user_that_places_stages_otherwise(threads: OneProcess, tmp_path: Path) -> None:
    check(threads, {"dp": 2, "pp": 2}, {"schedule": upwards, "microbatches": 3}, 12, tmp_path / "bundle")
    manifest = load_manifest(tmp_path / "bundle")
    assert placement_of(manifest) == (1, 0)
    assert [str(spans[0].compute) for spans in step_of(manifest).ranks] == ["1F0", "0F0"]
    verify_bundle(tmp_path / "bundle")


def swapped(pipeline: Pipeline) -> list[list[Compute]]:
    return [[*reversed(order)] for order in own(pipeline)]


def test_a_wrong_function_of_the_user_is_refused() -> None:
    with pytest.raises(PlanError) as error:
        compile_parallel(tower(), Mesh(pp=2), example_inputs=EXAMPLE, plan=Plan(schedule=swapped, microbatches=3))
    assert str(error.value) == ("the schedule is wrong: s1>B0 on pipeline rank 0 is before the forward F0")


@pytest.mark.gloo
@pytest.mark.parametrize("case", [({"pp": 4}, {"schedule": "zbv"}), ({"pp": 4}, {"schedule": "interleaved-zb"})])
def test_between_processes(case: Case, pool: Pool, tmp_path: Path) -> None:
    mesh, plan = case
    check(pool, mesh, {**plan, "microbatches": 8}, 16, tmp_path / "bundle")


class Chain(nn.Module):
    """Layers of which each feeds the next alone, as torch's lists of messages have it."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x - target).pow(2).mean()


@pytest.mark.parametrize("name", CLASSES)
def test_torch_s_own_lists(name: str, threads: OneProcess, tmp_path: Path) -> None:
    """Those of its tests; with messages as torch has them, and with our own."""
    ran = 0
    for num_chunks, microbatches, num_ranks in TRIPLES:
        stages = [Stage(num_ranks, num_chunks * num_ranks) for _ in range(num_chunks)]
        try:
            made = CLASSES[name](stages, microbatches)
        except ValueError:  # it is not defined for these
            continue
        size, num_stages = 2 * microbatches, num_chunks * num_ranks
        lists = {"alone": made.pipeline_order, "messages": made.pipeline_order_with_comms}
        for kind, rows in lists.items() if num_stages <= LAYERS else ():
            torch.manual_seed(0)
            model = Tower(num_stages) if kind == "alone" else Chain(num_stages)
            file = tmp_path / f"{kind}-{num_chunks}-{microbatches}-{num_ranks}.csv"
            file.write_text(text_of(rows))
            plan = {"schedule": str(file), "microbatches": microbatches}
            expected = parity.reference(copy.deepcopy(model), batch(size), steps=1)
            parity.emit_case(file.with_suffix(""), model, EXAMPLE, {"pp": num_ranks}, plan)
            arguments = (str(file.with_suffix("")), batch(size), 1)
            parity.compare(threads.run("tests.gloo.parity:train", arguments, ranks=num_ranks), expected)
            ran += 1
    assert ran >= 6


@pytest.mark.parametrize(
    ("rank", "text", "other", "message"),
    [
        (1, "s0>[F1]", "", "the schedule does not bring x_2 from stage 0 before"),
        (0, "s1>B1", "B1", "the schedule does not bring the gradient of"),
        (0, "F1>s1", "F1>s1,s0", "the schedule's F1 sends to stage 0: no value goes that way"),
    ],
)
def test_an_edited_schedule_never_trains_on_less(
    rank: int, text: str, other: str, message: str, threads: OneProcess, tmp_path: Path
) -> None:
    """A gradient that does not come would be a silent zero."""
    bundle = tmp_path / "bundle"
    parity.emit_case(bundle, Chain(2), EXAMPLE, {"pp": 2}, {"microbatches": 3})
    shutil.rmtree(bundle / "ranks")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = {name: known for name, known in manifest["files"].items() if "ranks" not in name}
    assert text in manifest["schedule"][rank]
    manifest["schedule"][rank] = manifest["schedule"][rank].replace(text, other)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Failed) as error:
        threads.run("tests.gloo.parity:train", (str(bundle), batch(6), 1), ranks=2)
    assert message in str(error.value)
    with pytest.raises(BundleError, match="the schedule is wrong"):
        verify_bundle(bundle)


def traced(bundle: str, path: str, size: int) -> None:
    trainer = Trainer(bundle, optimizer=torch.optim.SGD, device="cpu")
    with trainer.trace(path):
        trainer.step(trainer.shard(batch(size)))


def test_a_trace_of_a_real_step(threads: OneProcess, tmp_path: Path) -> None:
    program = compile_parallel(tower(), Mesh(pp=2), example_inputs=EXAMPLE, plan=Plan(schedule="zbv", microbatches=4))
    bundle, path = program.emit(tmp_path / "bundle"), tmp_path / "trace.json"
    threads.run("tests.gloo.test_schedules:traced", (str(bundle), str(path), 8), ranks=2)
    events = json.loads(path.read_text())["traceEvents"]
    for rank, row in enumerate(program.lowered.step.rows):
        ran = [event for event in events if event["ph"] == "X" and event["tid"] == rank and event["cat"] != "waiting"]
        assert [event["name"] for event in sorted(ran, key=lambda e: e["ts"])] == [a.name for a in row if a.runs]
        assert all(b["ts"] >= a["ts"] + a["dur"] - 1e-3 for a, b in itertools.pairwise(ran))
        alive = [event["args"]["chunks alive"] for event in events if event["ph"] == "C" and event["tid"] == rank]
        assert alive[-1] == 0 and program.lowered.step.peaks and max(alive) <= program.lowered.step.peaks[rank]


@pytest.mark.parametrize(("name", "microbatches"), [("zb-h1", 3), ("1f1b", 2)])
def test_a_batch_of_another_size_than_the_example(
    name: str, microbatches: int, threads: OneProcess, tmp_path: Path
) -> None:
    """Rooms for messages follow the batch, without a word between the ranks."""
    plan = {"schedule": name, "microbatches": microbatches}
    model, example = models.build("llama"), models.batch("llama", "uneven")
    parity.emit_case(tmp_path / "bundle", model, example, {"pp": 2}, plan)
    other = models.batch("llama", "uneven", 6, 11)
    got = threads.run("tests.gloo.parity:train", (str(tmp_path / "bundle"), other), ranks=2)
    parity.compare(got, parity.reference(models.build("llama"), other))
