"""Tensor parallel: heads and features split, two conversions around each attention and each MLP.

The compiler finds Megatron's plan by cost: columns, then rows; one sum after the attention, one after the MLP. The
second
part permits splitting the sequence too, and sums become reduce_scatter and all_gather.
"""

from lesson import show

from meshwright import Mesh, Plan

if __name__ == "__main__":
    conversions = ("invariant_to_replicated(", "all_reduce(", "all_gather(", "reduce_scatter(", "F.linear")
    show("Tensor parallel on 2 ranks", Mesh(tp=2), Plan(), parameters=("_proj",), words=conversions)
    show("With the sequence split", Mesh(tp=2), Plan(sequence_parallel=True), words=conversions)
