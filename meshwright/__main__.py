"""The command line: compile a model or measure it; explain a bundle, verify it or see a step of it in time."""

import importlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status

from meshwright.api import compile_parallel
from meshwright.codegen.bundle import verify_bundle
from meshwright.codegen.report import explain_manifest
from meshwright.codegen.steps import step_of
from meshwright.compiler.errors import BundleError, MeshwrightError, PlanError
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan
from meshwright.passes.schedules import drawing, timeline
from meshwright.profile import profile

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Directory = Annotated[Path, typer.Argument(help="A bundle that compile wrote.")]


@app.command("compile")
def compile_command(
    factory: Annotated[str, typer.Argument(help="MODULE:FACTORY, a function that returns (model, example_inputs).")],
    mesh: Annotated[str, typer.Option(help="Axes and sizes, outermost first: dp=2,pp=2,tp=2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.")],
    plan: Annotated[Path | None, typer.Option(help="A TOML file with the choices of Plan.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace foreign and edited files.")] = False,
) -> None:
    """Compile a model for a mesh and write the bundle."""
    console = Console(stderr=True)
    with console.status("loading the model") as status:
        model, example = load_factory(factory)()
        status.update("capture")
        program = compile_parallel(
            model,
            parse_mesh(mesh),
            example_inputs=example,
            plan=load_plan(plan),
            progress=lambda stage, seconds: _show(console, status, stage, seconds),
        )
        status.update("emit")
        directory = program.emit(output, overwrite=overwrite)
    console.print(f"wrote {directory}: torchrun --nproc-per-node {parse_mesh(mesh).num_ranks} {directory / 'train.py'}")


@app.command("explain")
def explain_command(directory: Directory) -> None:
    """Show every parameter and activation of a bundle, its types and what they cost."""
    typer.echo(explain_manifest(load_manifest(directory)))


@app.command("verify")
def verify_command(directory: Directory) -> None:
    """Check a bundle from its manifest and files alone: names, shapes, types, schedules, message order."""
    for line in verify_bundle(directory):
        typer.echo(line)


@app.command("timeline")
def timeline_command(
    directory: Directory,
    svg: Annotated[Path | None, typer.Option(help="Draw the step into this file.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the step as a trace for Perfetto.")] = None,
) -> None:
    """Show a step of a bundle in time, simulated by the costs that it was compiled with."""
    manifest = load_manifest(directory)
    step = step_of(manifest)
    typer.echo(timeline.text(step, timeline.readable(step)), nl=False)
    title = f"{manifest['model']}, {manifest['plan']['schedule']}, {manifest['times']} times in seconds"
    if svg is not None:
        _write(svg, drawing.svg(step, title))
    if trace is not None:
        _write(trace, timeline.trace(step))


@app.command("profile")
def profile_command(
    factory: Annotated[str, typer.Argument(help="MODULE:FACTORY, a function that returns (model, example_inputs).")],
    mesh: Annotated[str, typer.Option(help="Axes and sizes, outermost first: dp=2,pp=2,tp=2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, for Plan(times=...).")],
    plan: Annotated[Path | None, typer.Option(help="A TOML file with the choices of Plan.")] = None,
    device: Annotated[str, typer.Option(help="What to measure on: cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure the modules of a model on this machine, on one microbatch of the mesh."""
    with Console(stderr=True).status("measuring"):
        model, example = load_factory(factory)()
        found = profile(model, parse_mesh(mesh), example_inputs=example, plan=load_plan(plan), device=device)
    _write(output, found.text())
    total = sum(sum(times) for times in found.seconds.values())
    typer.echo(f"{len(found.seconds)} modules, {total * 1e3:.4g} ms for a microbatch on {found.device}: {output}")


def load_factory(text: str) -> Any:
    """The function that MODULE:FACTORY names. Raises PlanError."""
    module, _, name = text.partition(":")
    if not name:
        raise PlanError(f"{text!r} is not MODULE:FACTORY, as in 'my_package.models:build'")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise PlanError(f"cannot import {module!r}: {error}") from error
    except AttributeError:
        raise PlanError(f"module {module!r} has no {name!r}") from None


def parse_mesh(text: str) -> Mesh:
    """A mesh from ``dp=2,pp=2,tp=2``. Raises PlanError."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if not size.isdigit() or name in axes:
            raise PlanError(f"cannot read the mesh {text!r} at {part.strip()!r}: it is written dp=2,pp=2,tp=2")
        axes[name] = int(size)
    return Mesh(**axes)


def load_plan(path: Path | None) -> Plan:
    """A plan from a TOML file. Raises PlanError."""
    if path is None:
        return Plan()
    try:
        return Plan.from_dict(tomllib.loads(path.read_text()))
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"the plan {path} is no TOML: {error}") from error


def load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a bundle. Raises BundleError."""
    try:
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    except OSError as error:
        raise BundleError(f"{directory} is no bundle: cannot read manifest.json: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise BundleError(f"{directory / 'manifest.json'} is no JSON: {error}") from error
    return manifest


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}") from error


def _show(console: Console, status: Status, stage: str, seconds: float) -> None:
    console.print(f"{stage:<12}{seconds:7.2f} s")
    status.update("next stage")


def main() -> None:
    """Run the command line; an error of ours ends with its message and exit code 1."""
    try:
        app()
    except MeshwrightError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
