"""2D: data and pipeline parallel. Two pipelines of two stages; gradients are summed over dp once per step."""

from lesson import show

from meshwright import Mesh, Plan

if __name__ == "__main__":
    show(
        "2D on 4 ranks: dp=2 · pp=2",
        Mesh(dp=2, pp=2),
        Plan(microbatches=4),
        words=("param.typed", "nn.ModuleList", "GROUPS", '"F', '"0>'),
        files=("stages/stage_0.py", "stages/stage_1.py", "ranks/rank_0000.py", "ranks/rank_0003.py"),
    )
