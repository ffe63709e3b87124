"""Data parallel: every rank has the whole model and a piece of the batch; gradients are summed once per step.

A parameter is the same on every rank at rest (I) and used as R, whose gradient is a part: the sum over dp is pending,
and
the runtime makes it in buckets while the backward still runs. The loss is a sum over a count that all ranks know
beforehand.
"""

from lesson import show

from meshwright import Mesh, Plan

if __name__ == "__main__":
    show(
        "Data parallel on 4 ranks",
        Mesh(dp=4),
        Plan(),
        parameters=("q_proj", "norm.weight"),
        words=("param.typed", "num_valid"),
    )
