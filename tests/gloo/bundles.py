"""A small bundle written by hand, for any mesh of dp, pp and tp: the runtime tested without the compiler.

The model has what is hard on a runtime: a weight tied across stages, a value that skips a stage, an integer value
between stages, a parameter in segments, one split in groups, one whose gradient is pending over tp, a scalar, a frozen
one, a buffer, odd sizes, and a mean over a count that differs between replicas and microbatches.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from meshwright.passes.schedules import Edge, Pipeline, schedule
from meshwright.runtime.actions import render
from meshwright.runtime.groups import coordinates_of, num_ranks

WIDTH, HIDDEN, NUM_LAYERS = 6, 8, 3


class Layer(nn.Module):
    """Gated, with up holding gate and value as two groups of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(WIDTH))
        self.up = nn.Parameter(torch.empty(2 * HIDDEN, WIDTH))
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        gate, value = F.linear(features * self.norm, self.up).chunk(2, -1)
        result: torch.Tensor = features + self.down(torch.tanh(gate) * value)
        return result


class Model(nn.Module):
    """The same on one device."""

    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.fused = nn.Parameter(torch.empty(HIDDEN + 3, WIDTH))
        self.scale = nn.Parameter(torch.empty(()))
        self.frozen = nn.Parameter(torch.empty(5), requires_grad=False)
        self.register_buffer("offset", torch.empty(WIDTH))
        self.unembed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, features: torch.Tensor, kinds: torch.Tensor, valid: torch.Tensor, power: float) -> torch.Tensor:
        skip = self.embed(features)
        hidden = skip
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = F.linear(hidden + skip, self.unembed.weight.t()) + self.offset
        hidden = hidden * self.frozen[kinds].unsqueeze(-1)
        parts = torch.tanh(F.linear(hidden, self.fused)).sum(-1) * self.scale
        return (parts**power).masked_fill(~valid, 0).sum() / valid.sum()


def model() -> Model:
    """With values that are the same in every process."""
    generator = torch.Generator().manual_seed(0)
    result = Model().double()
    for tensor in [*result.parameters(), result.offset]:
        tensor.data.normal_(0.3, 0.5, generator=generator)
    return result


def batch(size: int = 12) -> dict[str, Any]:
    """A global batch whose first four rows have one valid row among them."""
    generator = torch.Generator().manual_seed(1)
    valid = torch.rand(size, generator=generator) < 0.7
    valid[:4] = torch.tensor([True, False, False, False])
    return {
        "features": torch.randn(size, WIDTH, generator=generator, dtype=torch.float64),
        "kinds": torch.randint(5, (size,), generator=generator),
        "valid": valid,
        "power": 2.0,
    }


BLOCK = """
class Layer(nn.Module):
    def __init__(self, param):
        super().__init__()
        self.norm = param("norm", (6,), tp="I -> R")
        self.up = param("up", (16, 6), tp="S(0/2)")
        self.weight = param("down.weight", (6, 8), tp="S(1)")
        self.bias = param("down.bias", (6,), tp="I")

    def forward(self, features):
        residual = features
        features = invariant_to_replicated(features, "tp")
        gate, value = F.linear(features * self.norm, self.up).chunk(2, -1)
        hidden = F.linear(torch.tanh(gate) * value, self.weight)
        return residual + (all_reduce(hidden, "tp") + self.bias)
"""

HEAD = '''
class Head(nn.Module):
    """A module of its own, and only this one has a frozen parameter."""

    def __init__(self, param):
        super().__init__()
        self.rows = param("fused", (11, 6), segment=(0, 0, 8), tp="S(0)")
        self.others = param("fused", (11, 6), segment=(0, 8, 3), tp="I")
        self.frozen = param("frozen", (5,), tp="I")

    def forward(self, hidden, kinds):
        hidden = hidden * self.frozen[kinds].unsqueeze(-1)
        parts = torch.tanh(F.linear(invariant_to_replicated(hidden, "tp"), self.rows)).sum(-1)
        return all_reduce(parts, "tp") + torch.tanh(F.linear(hidden, self.others)).sum(-1)
'''


def stage_file(index: int, stages: Sequence[range], zero: int) -> str:
    """The text of a stage that runs the layers of ``stages[index]``; the last has the loss."""
    first, last = index == 0, index == len(stages) - 1
    rest = "S(0) -> R" if zero == 3 else "I -> R"
    lines = [
        "import torch",
        "import torch.nn.functional as F",
        "from torch import nn",
        "",
        "from meshwright.runtime import all_reduce, invariant_to_replicated",
        "",
        BLOCK,
        HEAD,
        "",
        "class Stage(nn.Module):",
        "    def __init__(self, param):",
        "        super().__init__()",
        f"        param = param.typed(dp={rest!r})",
    ]
    if first or last:
        lines.append('        self.embed = param("embed.weight", (6, 6), tp="I")')
    lines.append(f"        self.layers = nn.ModuleList(Layer(param.scope(f'layers.{{i}}')) for i in {stages[index]!r})")
    if last:
        lines += [
            "        self.head = Head(param)",
            '        self.scale = param("scale", (), tp="I", dp="I -> R")',
            '        self.offset = param.buffer("offset", (6,))',
            "",
            "    def prepare(self, valid):",
            '        return all_reduce(valid.sum(), "dp")',
        ]
    arguments = ["features", "kinds"] if first else ["hidden", *(["skip", "kinds"] if last else [])]
    arguments += ["valid", "power", "num_valid"] if last else []
    lines += ["", f"    def forward(self, {', '.join(arguments)}):"]
    if first:
        lines += ["        skip = F.linear(features, self.embed)", "        hidden = skip"]
    lines += ["        for layer in self.layers:", "            hidden = layer(hidden)"]
    if last:
        lines += [
            "        hidden = F.linear(hidden + skip, self.embed.t()) + self.offset",
            "        parts = self.head(hidden, kinds) * self.scale",
            "        return (parts**power).masked_fill(~valid, 0).sum() / num_valid",
        ]
    else:
        lines.append(f"        return hidden{', skip, kinds' if first else ''}")
    return "\n".join(lines) + "\n"


def write_bundle(
    directory: Path,
    mesh: Mapping[str, int],
    *,
    zero: int = 0,
    microbatches: int = 1,
    name: str = "1f1b",
    weights: bool = True,
) -> Path:
    """The bundle for a mesh with any of the axes dp, pp and tp."""
    count = mesh.get("pp", 1)
    bounds = [k * NUM_LAYERS // count for k in range(count + 1)]
    stages = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    (directory / "stages").mkdir(parents=True)
    for index in range(count):
        (directory / f"stages/stage_{index}.py").write_text(stage_file(index, stages, zero))
    (directory / "manifest.json").write_text(json.dumps(manifest(mesh, stages, zero, microbatches, name), indent=1))
    if weights:
        (directory / "weights").mkdir()
        state = {n: t.contiguous() for n, t in model().state_dict().items() if n != "unembed.weight"}
        save_file(state, directory / "weights/model.safetensors")
    return directory


def manifest(
    mesh: Mapping[str, int], stages: Sequence[range], zero: int, microbatches: int, name: str
) -> dict[str, Any]:
    """What the stage files promise each other."""
    last = len(stages) - 1
    batched = {axis: "S(0)" for axis in ("dp", "mb") if axis in mesh or axis == "mb"}

    def on(**types: str) -> dict[str, str]:
        return {axis: text for axis, text in types.items() if axis in mesh}

    types = batched | on(tp="I")
    hidden = {"shape": ["B", WIDTH], "dtype": "float64", "types": types, "requires_grad": True}
    kinds = {"shape": ["B"], "dtype": "int64", "types": types, "requires_grad": False}
    edges: list[Edge] = [(k, k + 1) for k in range(last)]
    if last:
        edges += [(0, last), (0, last, False)]
    ranks = mesh.get("pp", 1)
    step = schedule(name, Pipeline.of(ranks, microbatches, len(stages) // ranks, edges=edges))
    described, all_ranks = [], range(num_ranks(mesh))
    for k in range(len(stages)):
        receives = {"hidden": {**hidden, "from": k - 1}} if k else {}
        sends = {"hidden": {**hidden, "to": [k + 1]}} if k < last else {}
        if last and k == last:
            receives |= {"skip": {**hidden, "from": 0}, "kinds": {**kinds, "from": 0}}
        if last and k == 0:
            sends |= {"skip": {**hidden, "to": [last]}, "kinds": {**kinds, "to": [last]}}
        described.append(
            {
                "file": f"stages/stage_{k}.py",
                "ranks": [r for r in all_ranks if coordinates_of(mesh, r).get("pp", 0) == step.placement[k]],
                "inputs": [*(["features", "kinds"] if k == 0 else []), *(["valid", "power"] if k == last else [])],
                "prepares": ["num_valid"] if k == last else [],
                "receives": receives,
                "sends": sends,
            }
        )
    rest = "S(0) -> R" if zero == 3 else "I -> R"

    def parameter(shape: list[int], stages: list[int], tp: str, dp: str = rest, **more: Any) -> dict[str, Any]:
        return {"shape": shape, "dtype": "float64", "types": on(dp=dp, tp=tp), "stages": stages, **more}

    parameters = {"embed.weight": parameter([6, 6], sorted({0, last}), "I", aliases=["unembed.weight"])}
    for k, layers in enumerate(stages):
        for i in layers:
            parameters |= {
                f"layers.{i}.norm": parameter([6], [k], "I -> R"),
                f"layers.{i}.up": parameter([16, 6], [k], "S(0/2)"),
                f"layers.{i}.down.weight": parameter([6, 8], [k], "S(1)"),
                f"layers.{i}.down.bias": parameter([6], [k], "I"),
            }
    parameters["fused"] = parameter([11, 6], [last], "I")
    parameters["fused"]["types"].pop("tp", None)
    parameters["fused"]["segments"] = [
        {"dim": 0, "start": 0, "length": 8, "types": on(tp="S(0)")},
        {"dim": 0, "start": 8, "length": 3, "types": on(tp="I")},
    ]
    parameters["scale"] = parameter([], [last], "I", "I -> R")
    parameters["frozen"] = parameter([5], [last], "I", trainable=False)
    return {
        "format": 2,
        "mesh": dict(mesh),
        "plan": {"microbatches": microbatches, "schedule": name, "zero": zero},
        "inputs": {
            "features": {"shape": ["B", WIDTH], "dtype": "float64", "types": batched},
            "kinds": {"shape": ["B"], "dtype": "int64", "types": batched},
            "valid": {"shape": ["B"], "dtype": "bool", "types": batched},
            "power": {"shape": [], "dtype": "float64"},
        },
        "loss": {"stage": last, "types": {"mb": "P", **on(dp="P", tp="I")}},
        "stages": described,
        "schedule": [render(row, "stage") for row in step.rows],
        "buffers": {"offset": {"shape": [6], "dtype": "float64", "stages": [last], "persistent": True}},
        "parameters": parameters,
    }
