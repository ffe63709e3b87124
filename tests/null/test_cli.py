"""The command line, from compile to verify."""

import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meshwright.__main__ import app, load_plan, parse_mesh
from meshwright.compiler.errors import PlanError

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
    done = run(app, ["verify", "out"])
    assert done.exit_code == 0 and "the schedule is proven" in done.output


def test_bad_arguments() -> None:
    with pytest.raises(PlanError, match="^cannot read the mesh 'dp=2,pp' at 'pp': it is written dp=2,pp=2,tp=2$"):
        parse_mesh("dp=2,pp")
    with pytest.raises(PlanError, match="^cannot read the plan nowhere.toml"):
        load_plan(Path("nowhere.toml"))
