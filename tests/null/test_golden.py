"""What is emitted, kept as text: read the difference as code. Refresh with ``make golden``."""

from collections.abc import Callable
from pathlib import Path

from meshwright import Mesh, Plan, compile_parallel
from tests import models

Golden = Callable[[str, dict[str, str]], None]


def _texts(directory: Path) -> dict[str, str]:
    kept = ["stages/stage_0.py", "stages/stage_1.py", "ranks/rank_0000.py", "ranks/rank_0006.py", "train.py"]
    return {name: (directory / name).read_text() for name in kept}


def test_llama_3d(golden: Golden, tmp_path: Path) -> None:
    program = compile_parallel(
        models.llama(2),
        Mesh(dp=2, pp=2, tp=2),
        example_inputs=models.batch("llama", size=8),
        plan=Plan(zero=1, microbatches=4),
    )
    program.emit(tmp_path / "bundle", weights=False)
    golden("llama-dp2pp2tp2", {**_texts(tmp_path / "bundle"), "explain.txt": program.explain() + "\n"})


def test_llama_sequence_parallel_zero3(golden: Golden, tmp_path: Path) -> None:
    program = compile_parallel(
        models.llama(2),
        Mesh(dp=2, tp=2),
        example_inputs=models.batch("llama", "padded", size=8),
        plan=Plan(zero=3, sequence_parallel=True),
    )
    program.emit(tmp_path / "bundle", weights=False)
    golden("llama-dp2tp2-sp-zero3", {"stages/stage_0.py": (tmp_path / "bundle/stages/stage_0.py").read_text()})


def test_gpt2_and_falcon_tp2(golden: Golden, tmp_path: Path) -> None:
    for name, model in (("gpt2", models.gpt2(2)), ("falcon", models.falcon(2))):
        program = compile_parallel(model, Mesh(tp=2), example_inputs=models.batch(name, size=8))
        program.emit(tmp_path / name, weights=False)
        golden(f"{name}-tp2", {"stages/stage_0.py": (tmp_path / name / "stages/stage_0.py").read_text()})
