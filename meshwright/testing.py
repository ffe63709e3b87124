"""For users' tests and ours: float64 reading, one device drawing as a program does, proofs of rules by brute force."""

from meshwright.compiler.precision import float64
from meshwright.compiler.reference import exact_random
from meshwright.passes.proofs import check_rule

__all__ = ["check_rule", "exact_random", "float64"]
