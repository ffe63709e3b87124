"""Pipeline parallel: stages and microbatches, one forward one backward (1F1B).

Microbatches are one more axis, in time: gradients are partial over it, and the loss is summed over it. The schedule is
proven before it is written: no rank can wait for another in a circle.
"""

from lesson import show

from meshwright import Mesh, Plan

if __name__ == "__main__":
    show(
        "Pipeline parallel on 4 ranks, 4 microbatches",
        Mesh(pp=4),
        Plan(microbatches=4),
        words=('"F', '"0>', '"1>', '"2>'),
        files=tuple(f"ranks/rank_{rank:04d}.py" for rank in range(4)),
    )
