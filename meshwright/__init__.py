"""Meshwright compiles one ordinary PyTorch model into the parallel program that every rank of a device mesh runs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.api import Program, compile_parallel
    from meshwright.compiler.errors import BundleError, InternalError, MeshwrightError, PlanError, UnsupportedError
    from meshwright.compiler.mesh import Mesh
    from meshwright.compiler.plan import Plan
    from meshwright.passes.factors import Rule
    from meshwright.passes.rules import DEFAULT_RULES

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_RULES",
    "BundleError",
    "InternalError",
    "Mesh",
    "MeshwrightError",
    "Plan",
    "PlanError",
    "Rule",
    "Program",
    "UnsupportedError",
    "compile_parallel",
]

_HOMES = {
    "DEFAULT_RULES": "meshwright.passes.rules",
    "Rule": "meshwright.passes.factors",
    "BundleError": "meshwright.compiler.errors",
    "InternalError": "meshwright.compiler.errors",
    "Mesh": "meshwright.compiler.mesh",
    "MeshwrightError": "meshwright.compiler.errors",
    "Plan": "meshwright.compiler.plan",
    "PlanError": "meshwright.compiler.errors",
    "Program": "meshwright.api",
    "UnsupportedError": "meshwright.compiler.errors",
    "compile_parallel": "meshwright.api",
}
"""Where public names live. They are imported on first use: a rank that runs emitted code loads the runtime alone."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meshwright' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
