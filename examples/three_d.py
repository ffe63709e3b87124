"""3D: pipeline, tensor and ZeRO data parallel together; nothing new, each axis has its own types."""

from lesson import show

from meshwright import Mesh, Plan

if __name__ == "__main__":
    show(
        "3D on 8 ranks: dp=2 · pp=2 · tp=2, ZeRO-1",
        Mesh(dp=2, pp=2, tp=2),
        Plan(zero=1, microbatches=4),
        parameters=("q_proj", "down_proj", "lm_head", "norm.weight"),
        words=("param.typed", "nn.ModuleList", ', "tp"', "num_valid"),
        files=("stages/stage_0.py", "stages/stage_1.py"),
    )
