"""Every example runs and says what it should; the large ones small."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

LESSONS = {
    "data_parallel": 'num_valid = all_reduce(num_valid, "dp")',
    "model_parallel": '"F0>1  1>B0"',
    "pipeline_parallel": '"F0>1  F1>1  F2>1  F3>1  1>B0  1>B1  1>B2  1>B3"',
    "fully_sharded": 'param.typed(dp="S(0) -> R")',
    "tensor_parallel": 'attn_output = reduce_scatter(attn_output, "tp", dim=1)',
    "two_d": 'GROUPS = {"dp": (0, 2), "pp": (0, 1)}',
    "three_d": "self_attn.q_proj.weight",
}


@pytest.mark.parametrize("name", LESSONS)
def test_lesson(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert LESSONS[name] in capsys.readouterr().out


def test_falcon_180b_with_few_layers() -> None:
    command = [sys.executable, str(EXAMPLES / "falcon_180b.py"), "--layers", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compiled for 4,096 ranks" in done.stdout and "stage 7: 512 ranks" in done.stdout


def test_every_example_is_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"models", "lesson"}
    assert scripts == {*LESSONS, "falcon_180b", "demo"}, "make demo runs the demo"
