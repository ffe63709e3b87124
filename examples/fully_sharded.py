"""Fully sharded (ZeRO-3): parameters rest in pieces, are gathered for a layer's forward and backward, and freed.

The gather is the conversion S(0) -> R of a parameter, the reduce_scatter of its gradient is that conversion's backward.
"""

from lesson import show

from meshwright import Mesh, Plan

if __name__ == "__main__":
    show(
        "Fully sharded data parallel on 4 ranks",
        Mesh(dp=4),
        Plan(zero=3),
        parameters=("q_proj", "norm.weight"),
        words=("param.typed",),
    )
