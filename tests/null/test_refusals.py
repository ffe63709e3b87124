"""What is refused, with the whole message: before any process waits on another."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshwright import Mesh, Plan, PlanError, UnsupportedError, compile_parallel
from meshwright.passes.rules import DEFAULT_RULES
from tests import models


def _mlp(mesh: Mesh, **plan: Any) -> None:
    compile_parallel(models.build("mlp"), mesh, example_inputs=models.batch("mlp"), plan=Plan(**plan))


def test_unknown_axis() -> None:
    with pytest.raises(PlanError, match="^unknown mesh axis 'xp': the axes are dp, pp, tp$"):
        Mesh(xp=2)


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(PlanError) as error:
        _mlp(Mesh(dp=5))
    assert str(error.value) == (
        "cannot cut the batch of 12 ('features', dim 0) over dp=5 times 1 microbatches: 12 is not a multiple of 5\n"
        "  use a batch of 15, or another dp or microbatches"
    )


def test_unknown_module_in_split() -> None:
    with pytest.raises(
        PlanError, match="split names 'layers.9', which is no module that the model runs\n  near it: layers"
    ):
        _mlp(Mesh(pp=2), split=("layers.9",))


def test_unknown_name_in_pin() -> None:
    with pytest.raises(PlanError, match=r"^the pin '\*\.query\.weight' matches no parameter"):
        _mlp(Mesh(tp=2), pins={"*.query.weight": {"tp": "I"}})


def test_user_split_is_followed() -> None:
    program = compile_parallel(
        models.build("mlp"),
        Mesh(pp=2),
        example_inputs=models.batch("mlp"),
        plan=Plan(split=("layers.1",), microbatches=2),
    )
    assert program.lowered.parameters["layers.1.up.weight"].stages == (1,)
    assert program.lowered.parameters["layers.0.up.weight"].stages == (0,)


def test_more_stages_than_places_to_cut() -> None:
    with pytest.raises(PlanError, match="the plan asks for 6 stages"):
        _mlp(Mesh(pp=6), microbatches=1)


def test_missing_example_inputs() -> None:
    with pytest.raises(PlanError) as error:
        compile_parallel(models.build("mlp"), Mesh(dp=2))
    assert str(error.value).startswith(
        "example_inputs is missing, and MLP has neither example_input_array nor dummy_inputs"
    )


def test_non_scalar_loss() -> None:
    with pytest.raises(PlanError, match="^the loss is not a scalar: it has shape"):
        compile_parallel(nn.Linear(4, 4), Mesh(dp=2), example_inputs=(torch.randn(4, 4),))


def test_no_loss() -> None:
    batch = {"input_ids": models.batch("llama")["input_ids"]}
    with pytest.raises(PlanError, match="^the model returns no loss"):
        compile_parallel(models.build("llama"), Mesh(dp=2), example_inputs=batch)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).sum()
        return y if y > 0 else -y  # type: ignore[no-any-return]


def test_data_dependent_control_flow(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UnsupportedError, match=r"^the model's control flow depends on its data at test_refusals.py:\d+ in forward: "
    ):
        compile_parallel(DataDependent(), Mesh(dp=2), example_inputs=(torch.randn(4, 4),))
    assert capfd.readouterr().err == "", "torch prints the graph"


class BatchMean(nn.Module):
    """A loss over the whole batch that is no sum over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).mean(0).pow(2).sum()  # type: ignore[no-any-return]


def test_batch_that_cannot_be_cut_in_time() -> None:
    with pytest.raises(PlanError) as error:
        compile_parallel(BatchMean(), Mesh(dp=1), example_inputs=(torch.randn(4, 4),), plan=Plan(microbatches=2))
    assert str(error.value) == (
        "the batch cannot be cut into microbatches without changing the result: the loss mixes samples of the batch\n"
        "  use microbatches=1"
    )


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).cumsum(1).pow(2).sum()  # type: ignore[no-any-return]


def test_batch_that_cannot_be_cut_in_time_for_want_of_a_rule() -> None:
    rules = {operator: rule for operator, rule in DEFAULT_RULES.items() if "cumsum" not in str(operator)}
    plan, batch = Plan(microbatches=2), (torch.randn(4, 4),)
    with pytest.raises(PlanError) as error:
        compile_parallel(Running(), Mesh(dp=1), example_inputs=batch, plan=plan, rules=rules)
    line = inspect.getsourcelines(Running.forward)[1] + 1
    assert str(error.value) == (
        f"the batch cannot be cut into microbatches: aten.cumsum.default at test_refusals.py:{line} has no rule and "
        'needs it whole\n  add a rule: rules={**DEFAULT_RULES, torch.ops.aten.cumsum.default: Rule("...")}, proven '
        "with meshwright.testing.check_rule, or use microbatches=1"
    )


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[x[:, 0] > 0].sum()  # type: ignore[no-any-return]


def test_a_size_that_depends_on_the_data() -> None:
    with pytest.raises(UnsupportedError) as error:
        compile_parallel(Chosen(), Mesh(dp=1), example_inputs=(torch.randn(4, 4),))
    line = inspect.getsourcelines(Chosen.forward)[1] + 1
    assert str(error.value) == (
        f"aten.index.Tensor at test_refusals.py:{line} gives a tensor whose size depends on the data, which no other "
        "rank knows\n  keep all elements and weight them, as in (x * mask).sum(), or read one place each: "
        "x.gather(dim, index)"
    )


def test_plan_choices() -> None:
    with pytest.raises(PlanError) as error:
        Plan(schedule="ZB-V")
    assert str(error.value) == (
        "unknown schedule 'ZB-V': the schedules are gpipe, 1f1b, interleaved, looped-bfs, zb-h1, zb-h2, "
        "interleaved-zb, zbv, dualpipe-v, v-half, v-min, auto, a .csv file or a function\n  did you mean 'zbv'?"
    )
    with pytest.raises(PlanError, match="^stages_per_rank=0: a whole number from 1, or None$"):
        Plan(stages_per_rank=0)
    with pytest.raises(PlanError) as error:
        Plan(reshard="never")  # type: ignore[arg-type]
    assert str(error.value) == "reshard='never': what ZeRO gathers is whole for each step or for each microbatch"
    with pytest.raises(PlanError, match="^zero=4"):
        Plan(zero=4)
    with pytest.raises(UnsupportedError, match="^precision='bf16' is not supported yet"):
        Plan(precision="bf16")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="^compile='max-autotune': True or False$"):
        Plan(compile="max-autotune")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="^unknown choice 'zeros' in the plan"):
        Plan.from_dict({"zeros": 1})


class Relative(nn.Module):
    """A loss in parts of a detached mean of activations over the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y.pow(2).mean() * y.detach().mean().exp()  # type: ignore[no-any-return]


def test_a_sum_over_microbatches_is_known_beforehand_only_of_inputs() -> None:
    with pytest.raises(PlanError) as error:
        compile_parallel(Relative(), Mesh(dp=2), example_inputs=(torch.randn(8, 4),), plan=Plan(microbatches=2))
    assert str(error.value) == (
        "the batch cannot be cut into microbatches without changing the result: the loss mixes samples of the batch\n"
        "  use microbatches=1"
    )


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    program = compile_parallel(models.build("mlp"), Mesh(dp=2), example_inputs=models.batch("mlp"))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").write_text("years of work")
    with pytest.raises(PlanError, match="has files that this would overwrite .*: thesis.tex"):
        program.emit(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"], "nothing half-written stays"


def test_edited_files_are_kept(tmp_path: Path) -> None:
    program = compile_parallel(models.build("mlp"), Mesh(dp=2), example_inputs=models.batch("mlp"))
    program.emit(tmp_path / "bundle")
    program.emit(tmp_path / "bundle")  # untouched: written again
    stage = tmp_path / "bundle" / "stages" / "stage_0.py"
    stage.write_text(stage.read_text() + "# mine\n")
    with pytest.raises(PlanError, match="stages/stage_0.py"):
        program.emit(tmp_path / "bundle")
    program.emit(tmp_path / "bundle", overwrite=True)
    assert "# mine" not in stage.read_text()


class SelfNormalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y.square().sum() / y.detach().abs().sum()  # type: ignore[no-any-return]


def test_sums_of_data_without_gradient_are_not_known_before_the_first_microbatch() -> None:
    compile_parallel(SelfNormalized(), Mesh(dp=2), example_inputs=(torch.randn(4, 4),))
    with pytest.raises(PlanError) as error:
        compile_parallel(SelfNormalized(), Mesh(dp=2), example_inputs=(torch.randn(4, 4),), plan=Plan(microbatches=2))
    assert str(error.value) == (
        "the batch cannot be cut into microbatches without changing the result: the loss mixes samples of the batch\n"
        "  use microbatches=1"
    )


@pytest.mark.parametrize("given", [lambda pipeline: None, lambda pipeline: [["F0"], ["F0"]]], ids=["nothing", "words"])
def test_a_function_that_gives_no_schedule(given: Callable[[Any], Any]) -> None:
    with pytest.raises(PlanError, match=r"^schedule '<lambda>\(\)' gives .*\n  it takes a list for each rank, of what"):
        compile_parallel(
            models.build("mlp"),
            Mesh(pp=2),
            example_inputs=models.batch("mlp"),
            plan=Plan(schedule=given, microbatches=2),
        )


def test_a_schedule_is_a_name_a_file_or_a_function(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="^schedule=5: a name, a .csv file or a function$"):
        Plan(schedule=5)  # type: ignore[arg-type]
    assert Plan(schedule=tmp_path / "own.csv").schedule_name == str(tmp_path / "own.csv")
