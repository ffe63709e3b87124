"""What the examples share: compile a small model, say what was split how, show the emitted lines that matter."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models import llama
from torch import nn

from meshwright import Mesh, Plan, compile_parallel


def show(
    title: str,
    mesh: Mesh,
    plan: Plan,
    *,
    factory: Callable[[], tuple[nn.Module, dict[str, Any]]] = llama,
    words: Sequence[str],
    files: Sequence[str] = ("stages/stage_0.py",),
    parameters: Sequence[str] = (),
) -> None:
    """Compile, and print the parameters named and the lines of the files that contain one of ``words``."""
    model, batch = factory()
    program = compile_parallel(model, mesh, example_inputs=batch, plan=plan)
    print(f"{title}\n{'=' * len(title)}")
    report = program.explain().splitlines()
    print("\n".join(line for line in report[:2]))
    for line in report:
        if line.startswith("  stage") and "ranks" in line or any(name in line for name in parameters):
            print(line)
    with tempfile.TemporaryDirectory() as directory:
        program.emit(Path(directory) / "bundle", weights=False)
        for name in files:
            lines = (Path(directory) / "bundle" / name).read_text().splitlines()
            chosen = [line for line in lines if any(word in line for word in words)]
            print(f"\n{name}")
            print("\n".join(f"  {line.strip()}" for line in dict.fromkeys(chosen)))
    print()
