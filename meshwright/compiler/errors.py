"""The errors of the compiler: whose turn it is, by family."""

from meshwright.runtime.errors import BundleError, MeshwrightError, PlanError

__all__ = ["BundleError", "InternalError", "MeshwrightError", "PlanError", "UnsupportedError"]


class UnsupportedError(MeshwrightError):
    """The model or the plan uses what is not supported."""


class InternalError(MeshwrightError):
    """A bug of Meshwright: the message quotes the piece of the program around it."""
