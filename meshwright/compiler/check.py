"""What can be refused once the model is captured and before anything is decided."""

import difflib
import fnmatch

from meshwright.compiler.errors import PlanError
from meshwright.compiler.graph import Capture
from meshwright.compiler.leaves import BATCH
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.plan import Plan


def check_request(capture: Capture, mesh: Mesh, plan: Plan) -> None:
    """Raises PlanError for a batch that dp times microbatches does not divide, and for names that the model does not
    have.
    """
    microbatches = plan.num_microbatches(mesh.size("pp"))
    pieces = mesh.size("dp") * microbatches
    for leaf in capture.inputs:
        size = capture.symbols.get(BATCH) if leaf.batched and leaf.shape[0] == BATCH else None
        size = int(leaf.shape[0]) if leaf.batched and size is None else size
        if size is not None and size % pieces:
            raise PlanError(
                f"cannot cut the batch of {size} ({leaf.name!r}, dim 0) over dp={mesh.size('dp')} times "
                f"{microbatches} microbatches: {size} is not a multiple of {pieces}\n"
                f"  use a batch of {-(-size // pieces) * pieces}, or another dp or microbatches"
            )
    names = [(name, *p.aliases) for name, p in capture.parameters.items()]
    for pattern, types in plan.pins.items():
        matched = [n for n in names if any(fnmatch.fnmatchcase(x, pattern) for x in n)]
        if not matched:
            raise PlanError(f"the pin {pattern!r} matches no parameter\n{_near(pattern, [n[0] for n in names])}")
        for name in matched:
            for axis in types:
                plan.pinned(name, axis)


def kept_in_eval(capture: Capture) -> tuple[str, ...]:
    """A line where modules of a model in training mode are in eval mode: they were left so, or forgotten."""
    names = [name for name in capture.in_eval if name.rpartition(".")[0] not in capture.in_eval]
    if not names:
        return ()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more}: in eval mode inside a model in training mode, and compiled so (no dropout, "
        "running statistics)\n  call model.train() first to train them",
    )


def _near(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3)
    return f"  near it: {', '.join(near)}" if near else "  a pattern is a name with * and ?, as in '*.up_proj.weight'"
