"""Model parallel: the layers are cut into stages on different ranks; the whole batch passes as one microbatch.

While one stage works the other waits: the pipeline example mends that.
"""

from lesson import show

from meshwright import Mesh, Plan

if __name__ == "__main__":
    show(
        "Model parallel on 2 ranks",
        Mesh(pp=2),
        Plan(microbatches=1),
        words=("nn.ModuleList", "return hidden_states", "def forward", "SCHEDULE", '"F', '"0>'),
        files=("stages/stage_0.py", "stages/stage_1.py", "ranks/rank_0000.py", "ranks/rank_0001.py"),
    )
