"""The bundle on disk: readable, checked by ruff, of bounded length, safe against a model's own text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from meshwright import BundleError, Mesh, Plan, compile_parallel
from meshwright.codegen.bundle import verify_bundle
from tests import models
from tests.null.passes import Model, parameter


def _emit(model: nn.Module, name: str, mesh: Mesh, directory: Path, **plan: object) -> Path:
    program = compile_parallel(model, mesh, example_inputs=models.batch(name), plan=Plan(**plan))  # type: ignore[arg-type]
    return program.emit(directory)


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2", "falcon"])
def test_ruff_is_content(name: str, tmp_path: Path) -> None:
    directory = _emit(models.build(name), name, Mesh(dp=2, pp=2, tp=2), tmp_path / "bundle", microbatches=3)
    files = [str(p) for p in directory.rglob("*.py")]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,W", "--line-length", "120"]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # without margin and "fmt: off" the formatter has nothing to change
    for path in (directory / "stages").iterdir():
        lines = [
            _without_margin(line)
            for line in path.read_text().splitlines()
            if not line.startswith(("# fmt", "# The margin"))
        ]
        text = "\n".join(lines) + "\n"
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "120", "-"],
            input=text,
            capture_output=True,
            text=True,
        )
        assert done.stdout == text


def _without_margin(line: str) -> str:
    code, mark, _ = line.partition("  # ")
    return code.rstrip() if mark and code.strip() else line


def test_stage_files_do_not_grow_with_layers(tmp_path: Path) -> None:
    lengths = []
    for layers in (4, 24):
        directory = _emit(models.llama(layers), "llama", Mesh(dp=2, pp=2, tp=2), tmp_path / str(layers), microbatches=3)
        lengths.append([len(p.read_text().splitlines()) for p in sorted((directory / "stages").iterdir())])
    assert lengths[0] == lengths[1]
    assert max(lengths[0]) < 250


def test_the_same_input_gives_the_same_program(tmp_path: Path) -> None:
    first = _emit(models.build("llama"), "llama", Mesh(tp=2, pp=2), tmp_path / "a")
    second = _emit(models.build("llama"), "llama", Mesh(tp=2, pp=2), tmp_path / "b")
    for path in first.rglob("*.py"):
        assert path.read_text() == (second / path.relative_to(first)).read_text()
    assert json.loads((first / "manifest.json").read_text()) == json.loads((second / "manifest.json").read_text())


class Nasty(nn.Module):
    """Names that would be code if they were pasted into text."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module('quote" + __import__("os") + "', nn.Linear(4, 4))
        self.add_module("class", nn.Linear(4, 4))
        self.add_module("new\nline {i}", nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self._modules.values():
            assert module is not None
            x = torch.relu(module(x))
        return x.pow(2).mean()


def test_text_from_the_model_is_data(tmp_path: Path) -> None:
    program = compile_parallel(Nasty(), Mesh(dp=2), example_inputs=(torch.randn(4, 4),))
    directory = program.emit(tmp_path / "bundle")
    source = (directory / "stages/stage_0.py").read_text()
    compile(source, "stage_0.py", "exec")
    assert set(json.loads((directory / "manifest.json").read_text())["parameters"]) == {
        n for n, _ in Nasty().named_parameters()
    }
    assert not any(line.strip().startswith("line {i}") for line in source.splitlines())


def test_a_size_that_is_computed_stands_in_parentheses(tmp_path: Path) -> None:
    model = Model(lambda self, x: (x * self.w).sum() / x.numel() - x.sum() / (x.shape[0] + 1), w=parameter(3))
    program = compile_parallel(model, Mesh(dp=2), example_inputs={"x": torch.randn(4, 3)})
    text = (program.emit(tmp_path / "bundle") / "stages/stage_0.py").read_text()
    assert "/ (6*B) - " in text and "/ (2*B + 1)" in text


def test_parts_of_given_sizes_are_split_as_people_write_it(tmp_path: Path) -> None:
    def run(self: Model, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.split(x * self.w, [1, 2], dim=-1)  # type: ignore[operator]
        return (first * second).sum()

    program = compile_parallel(Model(run, w=parameter(3)), Mesh(dp=2), example_inputs={"x": torch.randn(4, 3)})
    text = (program.emit(tmp_path / "bundle") / "stages/stage_0.py").read_text()
    assert ".split((1, 2), dim=-1)" in text


def test_verify_finds_what_was_changed(tmp_path: Path) -> None:
    directory = _emit(models.build("llama"), "llama", Mesh(pp=2, tp=2), tmp_path / "bundle", microbatches=4)
    assert verify_bundle(directory)[-1] == "no file was edited"
    stage, rank = directory / "stages/stage_0.py", directory / "ranks/rank_0000.py"
    kept = stage.read_text()
    stage.write_text(kept.replace("(176, 64)", "(177, 64)"))
    with pytest.raises(
        BundleError, match=r"declares 'mlp.gate_proj.weight' with shape \(177, 64\), the manifest says \(176, 64\)"
    ):
        verify_bundle(directory)
    stage.write_text(kept + "\n# a remark\n")
    assert verify_bundle(directory)[-1] == "edited since they were emitted: stages/stage_0.py"
    text = rank.read_text()
    rank.write_text(text.replace("F0>2  F1>2", "F1>2  F0>2"))
    with pytest.raises(
        BundleError, match="rank_0000.py has another schedule than the manifest has for pipeline rank 0"
    ):
        verify_bundle(directory)
    rank.write_text(text)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["schedule"][1] = manifest["schedule"][1].replace("B3>s0", "B3")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError):
        verify_bundle(directory)


def test_only_the_asked_ranks_of_a_large_mesh(tmp_path: Path) -> None:
    program = compile_parallel(models.build("mlp"), Mesh(dp=1024, pp=2), example_inputs=models.batch("mlp", size=2048))
    program.emit(tmp_path / "roles", weights=False)
    assert sorted(p.name for p in (tmp_path / "roles/ranks").iterdir()) == ["rank_0000.py", "rank_0001.py"]
    program.emit(tmp_path / "asked", ranks=[7], weights=False)
    assert [p.name for p in (tmp_path / "asked/ranks").iterdir()] == ["rank_0007.py"]
