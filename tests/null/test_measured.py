"""Measured times in the place of modelled ones: the same cut and costs as if the model of costs had said so."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshwright import Mesh, Plan, PlanError, compile_parallel
from meshwright.codegen.edges import edge_names
from meshwright.codegen.manifest import manifest_of
from meshwright.passes.cost import Times
from meshwright.passes.partition import partition
from meshwright.passes.timing import Timing, costs
from meshwright.profile import _Machine, profile
from tests import models
from tests.null.passes import Model, parameter, timed_blocks

X = torch.randn(8, 16)
Seconds = Mapping[str, Mapping[str, float]]


def layers(count: int = 4) -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> Any:
        x = x * self.stem
        for layer in self.h:
            x = layer(x)
        return self.head(x).sum()

    some = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(count)]
    return Model(run, stem=parameter(16), h=nn.ModuleList(some), head=nn.Linear(16, 64))


def seconds(forward: float, inputs: float, weights: float) -> dict[str, float]:
    return Times(forward, inputs, weights)._asdict()


def timed(times: Any, **mesh: int) -> tuple[Any, Timing]:
    return timed_blocks(layers(), (X,), Plan(times=times, microbatches=2), **mesh)


def of_module(timing: Timing, name: str) -> Times:
    return next(times for node, times in timing.times.items() if node.op == "call_module" and node.target == name)


def test_a_measured_module_takes_what_was_measured() -> None:
    times = {f"h.{i}": seconds(1.0, 2.0, 3.0) for i in range(4)} | {"h.1": seconds(10.0, 2.0, 0.0)}
    blocks, timing = timed(times, pp=2)
    assert of_module(timing, "h.0") == pytest.approx((1.0, 2.0, 3.0))
    assert of_module(timing, "h.1") == pytest.approx((10.0, 2.0, 0.0))
    parts = partition(blocks, 2, None, timing.seconds)
    stages = [stage for node, stage in parts.stage.items() if node.op == "call_module"]
    assert stages == [0, 0, 1, 1]
    assert costs(parts, timing).forward[0] >= 11.0


def test_a_cut_by_measured_times_is_another() -> None:
    """The last layer takes as long as all others together."""
    times = {f"h.{i}": seconds(0.0, 1.0 if i < 3 else 3.0, 0.0) for i in range(4)}
    blocks, timing = timed(times | {"head": seconds(0.0, 0.0, 0.0)}, pp=2)
    parts = partition(blocks, 2, None, timing.seconds)
    assert [stage for node, stage in parts.stage.items() if node.op == "call_module"] == [0, 0, 0, 1]


def test_what_was_not_measured_keeps_its_modelled_time_by_the_median_ratio() -> None:
    """Modelled at the sizes of the example, where both layers take the same."""
    plain = {f"h.{i}": seconds(1.0, 1.0, 1.0) for i in range(3)}
    _, every = timed(plain, pp=2)
    _, twice = timed({name: seconds(2.0, 2.0, 2.0) for name in plain}, pp=2)
    assert sum(of_module(every, "h.3")) == pytest.approx(3.0)
    assert sum(of_module(twice, "h.3")) == pytest.approx(6.0)
    _, odd = timed(plain | {"h.0": seconds(50.0, 50.0, 50.0)}, pp=2)
    assert of_module(odd, "h.3") == pytest.approx(of_module(every, "h.3"))


def test_nodes_of_one_module_share_its_time() -> None:
    blocks, timing = timed({"head": seconds(3.0, 5.0, 7.0)}, pp=2)
    own = [times for node, times in timing.times.items() if node.name in ("linear_default_8", "add_tensor_8")]
    assert len(own) == 2 and sum(own, Times()) == pytest.approx((3.0, 5.0, 7.0))


def test_measured_whole_is_cut_over_tp_as_it_is_modelled() -> None:
    """Half of the products and half of what is between them; the bias behind the sum is whole on both ranks."""
    times = {f"h.{i}": seconds(1.0, 1.0, 1.0) for i in range(4)}
    _, timing = timed(times, tp=2)
    assert all(0.5 <= time < 1.0 for time in of_module(timing, "h.2")[:1])


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            {"layer.0": seconds(1, 1, 1), "layer.1": seconds(1, 1, 1)},
            "times has times of 2 modules, 'layer.0' the first, of which the model runs none\n"
            "  near it: h.0\n  measure this model with: meshwright profile",
        ),
        (
            {"h.0": {"forward": 1.0}},
            "times: 'h.0' has {'forward': 1.0}\n  a module has seconds from 0 for forward, inputs, weights",
        ),
        (
            {"h.0": seconds(1.0, -1.0, 0.0)},
            "times: 'h.0' has {'forward': 1.0, 'inputs': -1.0, 'weights': 0.0}\n"
            "  a module has seconds from 0 for forward, inputs, weights",
        ),
        ("nowhere.json", "times='nowhere.json' cannot be read: No such file or directory"),
    ],
)
def test_times_that_are_none(times: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        timed(times, pp=2)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "'seconds'"), ('{"seconds": []}', "'seconds' is no table"), ("[]", "list indices must be integers")],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(PlanError) as error:
        timed(tmp_path / "t.json", pp=2)
    head = f"times={str(tmp_path / 't.json')!r} is no file that meshwright profile wrote: "
    assert str(error.value).startswith(head + message)


def test_a_compiled_program_is_cut_by_the_times_of_a_file(tmp_path: Path) -> None:
    """A block that was measured slower than the others has a stage for itself."""

    def cut(slow: float) -> tuple[list[int], dict[str, Any]]:
        rows = {f"h.{i}": seconds(1.0, 1.0, slow if i == 3 else 1.0) for i in range(4)} | {"head": seconds(0, 0, 0)}
        path = tmp_path / "times.json"
        path.write_text(json.dumps({"seconds": rows}))
        plan = Plan(times=path, microbatches=2)
        found = compile_parallel(layers(), Mesh(pp=2), example_inputs=(X,), plan=plan)
        manifest = manifest_of(found.lowered, edge_names(found.lowered))
        stages = [manifest["parameters"][f"h.{i}.0.weight"]["stages"] for i in range(4)]
        return [stage for (stage,) in stages], manifest

    even, _ = cut(1.0)
    assert even == [0, 0, 1, 1]
    uneven, manifest = cut(9.0)
    assert uneven == [0, 0, 0, 1] and manifest["times"] == "measured"
    assert manifest["stages"][1]["costs"]["weights"] == pytest.approx(9.0, rel=1e-3)


# Measuring


def test_a_profile_has_every_module_and_is_taken_by_a_plan(tmp_path: Path) -> None:
    """A few runs of a millisecond: that there is a time, and not how long it is."""
    model, batch = models.build("llama"), models.batch("llama")
    found = profile(model, Mesh(pp=2), example_inputs=batch, plan=Plan(microbatches=2))
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head", ""]
    assert list(found.seconds) == names
    assert found.sizes == {"B": batch["input_ids"].shape[0] // 2, "T": batch["input_ids"].shape[1]}
    layer = found.seconds["model.layers.0"]
    assert min(layer) > 0 and layer == found.seconds["model.layers.1"]
    assert found.seconds["model.embed_tokens"].inputs < found.seconds["model.embed_tokens"].weights
    (tmp_path / "times.json").write_text(found.text())
    assert json.loads(found.text())["seconds"]["lm_head"].keys() == {"forward", "inputs", "weights"}
    _, timing = timed_blocks(model, batch, Plan(times=tmp_path / "times.json", microbatches=2), pp=2)
    assert of_module(timing, "model.layers.1") == pytest.approx(layer, rel=1e-4)
    assert sum(map(sum, timing.times.values())) == pytest.approx(sum(map(sum, found.seconds.values())), rel=1e-4)


def test_a_distinct_block_runs_once_and_meta_parameters_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    timed = _Machine.timed

    def noted(self: Any, function: Any, piece: Any, made: Any, inputs: Any, prefix: str) -> Any:
        runs.append(prefix)
        return timed(self, function, piece, made, inputs, prefix)

    monkeypatch.setattr(_Machine, "timed", noted)
    with torch.device("meta"):
        model = layers(6)
    found = profile(model, Mesh(), example_inputs=(X,))
    blocks = [prefix for prefix in runs if prefix]
    assert len(blocks) == 1 and {f"h.{i}" for i in range(6)} <= set(found.seconds)


def test_measuring_leaves_the_model_alone() -> None:
    """Its buffers too, which forward writes to."""
    model = Model(lambda self, x: self.norm(self.up(x)).pow(3).sum(), up=nn.Linear(16, 8), norm=nn.BatchNorm1d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile(model, Mesh(), example_inputs=(X,))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())
