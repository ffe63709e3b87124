"""Buffers that forward writes to: what is stored and when, what is refused, what the emitted lines say."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import Mesh, Plan, PlanError, UnsupportedError, compile_parallel
from meshwright.api import Program
from meshwright.runtime import Trainer, batch_norm, store
from meshwright.runtime.buffers import _joined, _Normalization, _statistics
from meshwright.runtime.groups import Groups, using
from tests import written
from tests.gloo import parity

X = torch.randn(8, 4, 6)
BY_MICROBATCH: dict[str, Any] = {"microbatches": 2, "batch_statistics": "microbatch"}


class Model(nn.Module):
    """A layer, a batch norm and a buffer, and a forward as a function of them."""

    def __init__(self, run: Callable[[Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.run = run
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(4)
        self.level: torch.Tensor = nn.Buffer(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def _compiled(run: Callable[[Any, torch.Tensor], torch.Tensor], mesh: Mesh | None = None, **plan: Any) -> Program:
    return compile_parallel(Model(run), mesh or Mesh(dp=2), example_inputs=(X,), plan=Plan(**plan))


def _refusal(kind: type[Exception], run: Callable[[Any, torch.Tensor], torch.Tensor], **plan: Any) -> str:
    with pytest.raises(kind) as error:
        _compiled(run, **plan)
    return re.sub(r"\.py:\d+", ".py:N", str(error.value))


# On one rank, in microbatches


@pytest.mark.parametrize("name", ["average of all", "every kind", "averages", "counters"])
def test_microbatches_are_those_of_gradient_accumulation(name: str, tmp_path: Path) -> None:
    parity.emit_case(tmp_path / "bundle", written.build(name), written.batch(), {"dp": 1}, BY_MICROBATCH)
    got = parity.train(str(tmp_path / "bundle"), written.batch())
    parity.compare([got], parity.reference(written.build(name), written.batch(), microbatches=2))


def test_what_does_not_depend_on_activations_is_stored_once_per_step(tmp_path: Path) -> None:
    parity.emit_case(tmp_path / "bundle", written.build("counters"), written.batch(), {"dp": 1}, {"microbatches": 4})
    got = parity.train(str(tmp_path / "bundle"), written.batch())
    parity.compare([got], parity.reference(written.build("counters"), written.batch()))


def test_once_per_step_is_at_the_last_microbatch() -> None:
    groups = Groups(sizes={}, rank=0, device=torch.device("cpu"), microbatches=2)
    count = torch.zeros(())
    seen = []
    with using(groups):
        for groups.microbatch in (0, 1):
            store(count, count + 1, True, every="step")
            seen.append(count.item())
        store(count, count + 1, False)
    assert (seen, count.item()) == ([0.0, 1.0], 1.0)


def test_one_rank_normalizes_with_torchs_own_kernel() -> None:
    x, mean, var = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
    with using(Groups(sizes={}, rank=0, device=torch.device("cpu"), microbatches=1)):
        found = batch_norm(x, mean, var, None, None, True, momentum=0.1, eps=1e-5, over=("dp",))
    wanted_mean, wanted_var = torch.zeros(3), torch.ones(3)
    assert torch.equal(found, F.batch_norm(x, wanted_mean, wanted_var, None, None, True, 0.1, 1e-5))
    assert torch.equal(mean, wanted_mean) and torch.equal(var, wanted_var)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_backward_is_that_of_the_whole_batch(dtype: torch.dtype, tolerance: float, affine: bool) -> None:
    x = torch.randn(6, 3, 5, dtype=dtype) * 2 + 1
    given = [x, *([torch.randn(3, dtype=dtype), torch.randn(3, dtype=dtype)] if affine else [])]
    upstream = torch.randn(6, 3, 5, dtype=dtype)

    def gradients(normalized: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        result = normalized(leaves[0], *(leaves[1:] or (None, None)))
        return [result, *torch.autograd.grad(result, leaves, upstream)]

    def of_pieces(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        parts = torch.stack([torch.stack(_statistics(part, ())) for part in x.detach().split([1, 5])])
        count, mean, squares = _joined(parts)
        given = (count, mean, squares / count, 1e-5, ())
        return _Normalization.apply(x, weight, bias, *given)  # type: ignore[no-any-return, no-untyped-call]

    wanted = gradients(lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5))
    for a, b in zip(gradients(of_pieces), wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The program


def test_a_batch_norm_is_one_call_that_is_told_its_axes(tmp_path: Path) -> None:
    _compiled(lambda m, x: m.norm(m.layer(x)).pow(2).mean()).emit(tmp_path / "bundle")
    text = (tmp_path / "bundle/stages/stage_0.py").read_text()
    assert "store(self.norm_num_batches_tracked, self.norm_num_batches_tracked + 1, self.training)" in text
    (call,) = re.findall(r"batch_norm\(\n(.*?)\n +\)", text, re.DOTALL)
    assert [line.strip().removesuffix(",") for line in call.splitlines()] == [
        "layer",
        "self.norm_running_mean",
        "self.norm_running_var",
        "self.norm_weight",
        "self.norm_bias",
        "self.training",
        "momentum=0.1",
        "eps=1e-05",
        'over=("dp",)',
    ]


def test_statistics_of_split_channels_are_held_in_pieces() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, bias=False), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 3, bias=False))
    program = compile_parallel(
        model, Mesh(tp=2), example_inputs=(X,), loss_fn=lambda m, batch: m(*batch).pow(2).mean(),
        plan=Plan(pins={"0.weight": {"tp": "S(0)"}, "1.weight": {"tp": "S(0)"}}),
    )  # fmt: skip
    kept = {name: {axis: str(t) for axis, t in k.splits.items()} for name, k in program.lowered.buffers.items()}
    assert kept == {"1.num_batches_tracked": {}, "1.running_mean": {"tp": "S(0)"}, "1.running_var": {"tp": "S(0)"}}


def test_modules_in_eval_mode_stay_so_and_are_named() -> None:
    model = written.build("frozen")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = compile_parallel(model, Mesh(dp=2), example_inputs=written.batch())
    assert [str(w.message) for w in caught if "eval mode" in str(w.message)] == [
        "layers.1.norm, layers.2.norm: in eval mode inside a model in training mode, and compiled so (no dropout, "
        "running statistics)\n  call model.train() first to train them"
    ]
    counted = {name for name in program.lowered.buffers if name.endswith("num_batches_tracked")}
    assert counted == {"layers.0.norm.num_batches_tracked", "layers.3.norm.num_batches_tracked"}
    assert [module.training for module in model.modules() if isinstance(module, nn.BatchNorm1d)] == [1, 0, 0, 1]


def test_a_model_in_eval_mode_is_trained_as_a_whole() -> None:
    program = compile_parallel(written.build("stack").eval(), Mesh(dp=2), example_inputs=written.batch())
    assert sum(name.endswith("num_batches_tracked") for name in program.lowered.buffers) == 4


def test_the_model_keeps_its_momentum() -> None:
    model = written.build("average of all")
    compile_parallel(model, Mesh(dp=2), example_inputs=written.batch())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d)} == {None}


def test_a_meta_model_begins_with_the_statistics_of_its_initialization(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Model(lambda m, x: m.norm(m.layer(x)).pow(2).mean())
    compile_parallel(model, Mesh(dp=1), example_inputs=(X,)).emit(tmp_path / "bundle")
    trainer = Trainer(tmp_path / "bundle", optimizer=lambda named: torch.optim.SGD(named, lr=0.1), device="cpu")
    state = trainer.full_state_dict()
    found = [state[f"norm.{name}"] for name in ("running_mean", "running_var", "num_batches_tracked")]
    assert [value.unique().tolist() for value in found] == [[0.0], [1.0], [0]]


# What is refused


def test_batch_statistics_in_microbatches() -> None:
    assert _refusal(PlanError, lambda m, x: m.norm(m.layer(x)).pow(2).mean(), microbatches=2) == (
        "the batch cannot be cut into microbatches without changing the result: batch statistics are taken by norm at "
        "test_written.py:N\n"
        '  use microbatches=1, or batch_statistics="microbatch" (each by itself, as gradient accumulation has it)'
    )


def _averaging(model: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = model.layer(x)
    model.level.copy_(y.detach().std())
    return y.pow(2).mean()


def test_a_value_of_the_batch_stored_in_microbatches() -> None:
    assert _refusal(PlanError, _averaging, microbatches=2) == (
        "the batch cannot be cut into microbatches without changing the result: 'level' is written by the model at "
        "test_written.py:N with a value of the batch\n"
        '  use microbatches=1, or batch_statistics="microbatch" (each by itself, as gradient accumulation has it)'
    )
    _compiled(_averaging, **BY_MICROBATCH)
    with pytest.raises(PlanError, match="result: 'total' is written by the model at written.py"):  # the first of three
        compile_parallel(
            written.build("averages"), Mesh(dp=2), example_inputs=written.batch(), plan=Plan(microbatches=2)
        )


def _storing_the_loss(model: Any, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model.layer(x).pow(2).mean()
    model.level.copy_(loss.detach())
    return loss


def test_a_part_of_the_loss_stored_in_microbatches() -> None:
    assert _refusal(PlanError, _storing_the_loss, **BY_MICROBATCH) == (
        "cannot store a value of each microbatch by itself: 'loss', which is stored by the model at test_written.py:N, "
        "is also a part of the loss, which is summed over microbatches\n"
        "  compute what is stored apart from what the loss reads, or use microbatches=1"
    )


def test_a_buffer_of_two_stages() -> None:
    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = model.layer(x) * model.level
        z: torch.Tensor = model.norm(y)
        model.level.copy_(z.detach().mean())
        return z.pow(2).mean()

    with pytest.raises(PlanError) as error:
        _compiled(run, Mesh(pp=2), split=("norm",), microbatches=1)
    assert str(error.value) == (
        "stage 1 writes to the buffer 'level' (the model), and stage 0 uses it too\n"
        "  choose a split that keeps them together, or a smaller pp"
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda m, x: (m.norm(x) * m.norm.running_mean.sum()).mean(),
            "aten.sum.default at test_written.py:N uses 'norm.running_mean' after batch_norm wrote to it, which is not "
            "supported\n  use it before",
        ),
        (
            lambda m, x: F.batch_norm(m.layer(x), torch.zeros(4), torch.ones(4), training=True).mean(),
            "batch_norm at test_written.py:N writes running statistics that are no buffers of the model, or that "
            "forward changes itself, which is not supported\n  keep them with register_buffer",
        ),
        (
            lambda m, x: F.instance_norm(m.layer(x), m.norm.running_mean, m.norm.running_var).mean(),
            "instance_norm at test_written.py:N writes running statistics, which is not supported\n"
            "  use track_running_stats=False, which is the default",
        ),
    ],
    ids=["read after", "no buffers", "instance norm"],
)
def test_running_statistics_that_cannot_be_kept(run: Callable[..., torch.Tensor], message: str) -> None:
    assert _refusal(UnsupportedError, run) == message


def _normalizing_by_hand(model: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = model.layer(x)
    mean = y.mean()
    model.level.lerp_(mean.detach(), 0.1)
    loss: torch.Tensor = (y - mean).pow(2).mean()
    return loss


def _reading_what_was_written(model: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = model.layer(x)
    model.level.mul_(0.5).add_(y.detach().std())
    loss: torch.Tensor = y.pow(2).mean() * model.level
    return loss


@pytest.mark.parametrize("run", [_normalizing_by_hand, _reading_what_was_written])
def test_evaluation_of_what_is_not_known(run: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    _compiled(run, Mesh(dp=1)).emit(tmp_path / "bundle")
    trainer = Trainer(tmp_path / "bundle", optimizer=lambda named: torch.optim.SGD(named, lr=0.1), device="cpu")
    trainer.step((X,))
    with pytest.raises(PlanError) as error:
        trainer.evaluate((X,))
    assert re.sub(r"\.py:\d+", ".py:N", str(error.value)) == (
        "cannot evaluate: the loss depends on what forward writes to 'level' (at test_written.py:N), or on statistics "
        "of the batch in it, and the program was captured in training: what the model computes in eval mode is not "
        "known\n"
        "  evaluate the model itself with the parameters of full_state_dict()"
    )


@pytest.mark.parametrize("run", [_averaging, _storing_the_loss])
def test_evaluation_writes_nothing(run: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    _compiled(run, Mesh(dp=1)).emit(tmp_path / "bundle")
    trainer = Trainer(tmp_path / "bundle", optimizer=lambda named: torch.optim.SGD(named, lr=0.1), device="cpu")
    trainer.evaluate((X,))
    assert trainer.full_state_dict()["level"] == 1.0
    trainer.step((X,))
    assert trainer.full_state_dict()["level"] != 1.0
