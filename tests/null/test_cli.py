"""The command line, from compile to verify."""

import json
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meshwright.__main__ import app, load_plan, parse_mesh
from meshwright.codegen.steps import orders_of, step_of
from meshwright.compiler.errors import BundleError, PlanError
from meshwright.runtime.actions import parse

FACTORY = """
    import torch
    from tests import models

    def build():
        return models.build("mlp"), models.batch("mlp")
"""


def test_compile_explain_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_factory.py").write_text(textwrap.dedent(FACTORY))
    (tmp_path / "plan.toml").write_text('zero = 1\nmicrobatches = 3\n[pins]\n"head.weight" = {tp = "I"}\n')
    run = CliRunner().invoke
    done = run(app, ["compile", "my_factory:build", "--mesh", "dp=2,pp=2", "--plan", "plan.toml", "-o", "out"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/stages/stage_1.py").exists()
    done = run(app, ["explain", "out"])
    assert "MLP on dp=2 · pp=2" in done.output and "ZeRO-1" in done.output
    assert "a step in time, modelled for accelerators, microbatches of 4,096 tokens" in done.output
    assert "pipeline rank 1 (stage 1)" in done.output and "B of activations" in done.output
    done = run(app, ["verify", "out"])
    assert done.exit_code == 0 and "the schedule is proven" in done.output


def test_profile_and_timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_other_factory.py").write_text(textwrap.dedent(FACTORY))
    (tmp_path / "plan.toml").write_text('microbatches = 3\ntimes = "times.json"\n')
    run, source = CliRunner().invoke, "my_other_factory:build"
    done = run(app, ["profile", source, "--mesh", "dp=2,pp=2", "-o", "times.json"])
    assert done.exit_code == 0 and " modules, " in done.output and "for a microbatch on cpu (" in done.output
    done = run(app, ["compile", source, "--mesh", "dp=2,pp=2", "--plan", "plan.toml", "-o", "out"])
    assert done.exit_code == 0, done.output
    done = run(app, ["timeline", "out", "--svg", "step.svg", "--trace", "step.json"])
    assert done.exit_code == 0, done.output
    first, second, figures = done.output.splitlines()
    assert first.startswith("rank 0  F0") and second.startswith("rank 1  ") and figures.startswith("makespan ")
    assert "MLP, 1f1b, measured times in seconds" in (tmp_path / "step.svg").read_text()
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 2 * 2 * 3
    assert "by measured times" in run(app, ["explain", "out"]).output
    done = run(app, ["timeline", "out", "--svg", "nowhere/step.svg"])
    assert str(done.exception) == "cannot write nowhere/step.svg: No such file or directory"


def test_a_bundle_without_costs_has_no_timeline(tmp_path: Path) -> None:
    manifest = {"mesh": {}, "schedule": ["F0  B0"], "stages": [{"ranks": [0], "sends": {}}]}
    with pytest.raises(BundleError) as error:
        step_of(manifest)
    assert str(error.value) == (
        "the manifest says nowhere what its stages cost, or not so that it can be read: 'costs'\n"
        "  compile the model again"
    )


def test_orders_of_rows() -> None:
    """Stages are named where a rank has several; messages apart from their computation are none."""
    rows = [parse(row, "stage") for row in ("0F0>s1  s2>[3F0]  3F0  3B0>s2  s1>0B0", "s0>1F0  2F0>s3  s3>2B0  1B0>s0")]
    assert [" ".join(map(str, order)) for order in orders_of(rows, (0, 1, 1, 0))] == [
        "0F0 3F0 3B0 0B0",
        "1F0 2F0 2B0 1B0",
    ]


def test_a_step_whose_stages_lie_on_other_ranks_than_of_their_number() -> None:
    """As a user's own schedule may have it: the last stage on rank 0."""
    rows = [parse(row, "stage") for row in ("s0>F0  B0>s0", "F0>s1  s1>B0")]
    assert [" ".join(map(str, order)) for order in orders_of(rows, (1, 0))] == ["1F0 1B0", "0F0 0B0"]


def test_bad_arguments() -> None:
    with pytest.raises(PlanError, match="^cannot read the mesh 'dp=2,pp' at 'pp': it is written dp=2,pp=2,tp=2$"):
        parse_mesh("dp=2,pp")
    with pytest.raises(PlanError, match="^cannot read the plan nowhere.toml"):
        load_plan(Path("nowhere.toml"))
