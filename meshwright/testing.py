"""For users' tests and ours: float64 reading, and proofs of operator rules by brute force."""

from meshwright.compiler.precision import float64
from meshwright.passes.proofs import check_rule

__all__ = ["check_rule", "float64"]
