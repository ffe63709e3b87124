"""What has no rule runs whole, correct, and says what it costs; operators of other libraries are like any other."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import DEFAULT_RULES, Mesh, Plan, PlanError, Rule, UnsupportedError, compile_parallel
from meshwright.testing import check_rule
from tests import custom
from tests.null.passes import Model, check_exact, parameter

X = torch.randn(4, 6, 8)
HALVE = Rule("... d, d -> ... d", linear=((0,), (1,)))


def _without(name: str) -> dict[Any, Any]:
    return {operator: rule for operator, rule in DEFAULT_RULES.items() if name not in str(operator)}


def _warnings(model: nn.Module, rules: Any, plan: Plan | None = None, **mesh: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = compile_parallel(model, Mesh(**mesh), example_inputs=(X,), rules=rules, plan=plan)
    shown = [str(one.message) for one in caught if "has no rule" in str(one.message)]
    assert all(f"warning: {line}" in program.explain() for line in shown)
    return shown


def _smallest(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.up(x).kthvalue(3, -1).values.pow(2).mean()  # type: ignore[no-any-return]


def _line(function: Any) -> int:
    return inspect.getsourcelines(function)[1] + 1


@pytest.mark.parametrize("mesh", [{"dp": 2}, {"tp": 2}])
def test_an_operator_without_a_rule_says_what_it_costs(mesh: dict[str, int]) -> None:
    """Half of 4 * 6 * 8 floats are gathered, and of their gradient every rank keeps its piece."""
    (message,) = _warnings(Model(_smallest, up=nn.Linear(8, 8)), _without("kthvalue"), None, **mesh)
    assert message == (
        f"aten.kthvalue.default at test_fallback.py:{_line(_smallest)} has no rule and runs whole: "
        "384 bytes per step and rank, 384 forward and 0 backward\n"
        '  add a rule: rules={**DEFAULT_RULES, torch.ops.aten.kthvalue.default: Rule("...")}, proven with '
        "meshwright.testing.check_rule"
    )


def test_an_operator_with_a_weight_costs_a_reduction_of_the_gradient_too() -> None:
    model = Model(_halved, up=nn.Linear(8, 8), down=nn.Linear(8, 8), weight=parameter(8))
    (message,) = _warnings(model, DEFAULT_RULES, dp=2)
    assert "runs whole: 768 bytes per step and rank, 384 forward and 384 backward\n" in message


def test_all_operators_without_a_rule_are_named_at_once() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return self.up(x).kthvalue(3, -1).values.sum() + self.up(x).cumsum(1).pow(2).sum()

    rules = {operator: rule for operator, rule in _without("kthvalue").items() if "cumsum" not in str(operator)}
    model = Model(run, up=nn.Linear(8, 8))
    assert [line.partition(" ")[0] for line in _warnings(model, rules, dp=2)] == [
        "aten.kthvalue.default",
        "aten.cumsum.default",
    ]
    with pytest.raises(PlanError) as error:
        compile_parallel(model, Mesh(dp=1), example_inputs=(X,), rules=rules, plan=Plan(microbatches=2))
    assert [line.split(": ")[1].split(" ")[0] for line in str(error.value).splitlines()[::2]] == [
        "aten.kthvalue.default",
        "aten.cumsum.default",
    ]


def test_nothing_is_said_where_nothing_is_split() -> None:
    assert _warnings(Model(_smallest, up=nn.Linear(8, 8)), _without("kthvalue"), dp=1) == []


MIXED: dict[str, tuple[Any, dict[str, Any]]] = {
    "a sum of the batch in a product with a weight": (
        lambda self, x: self.down(torch.tanh(self.up(x).mean(0))).pow(2).mean(),
        {"up": nn.Linear(8, 8), "down": nn.Linear(8, 4)},
    ),
    "products of all samples beside a weight": (
        lambda self, x: torch.tanh(torch.addbmm(self.weight, self.up(x), x.mT)).pow(2).mean(),
        {"up": nn.Linear(8, 8), "weight": parameter(6, 6)},
    ),
    "distances of samples": (
        lambda self, x: torch.tanh(F.pdist(self.up(x).flatten(1))).sum() + self.up(x).pow(2).mean(),
        {"up": nn.Linear(8, 8)},
    ),
    "what is made of parameters alone": (
        lambda self, x: self.up(x).pow(2).mean() + 0.1 * self.up.weight.pow(2).sum(),
        {"up": nn.Linear(8, 8)},
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_samples_is_exact_over_replicas(name: str) -> None:
    run, members = MIXED[name]
    check_exact(Model(run, **members), (X,), dp=2, tp=2)


def test_what_is_made_of_parameters_counts_once_over_microbatches() -> None:
    run, members = MIXED["what is made of parameters alone"]
    check_exact(Model(run, **members), (X,), dp=2, mb=2)


# Operators of other libraries


def _halved(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down(custom.halve(self.up(x), self.weight)).pow(2).mean()  # type: ignore[no-any-return]


def test_a_rule_for_a_custom_operator_is_proven_and_used() -> None:
    model = Model(_halved, up=nn.Linear(8, 8), down=nn.Linear(8, 8), weight=parameter(8))
    arguments = [torch.randn(4, 6, 8).double(), torch.randn(8).double()]
    for operator in (custom.halve, torch.ops.meshwright_tests.halve, torch.ops.meshwright_tests.halve.default):
        assert check_rule(operator, HALVE, arguments) > 2
        assert _warnings(model, {**DEFAULT_RULES, operator: HALVE}, dp=2, tp=2) == []
    assert len(_warnings(model, DEFAULT_RULES, dp=2, tp=2)) == 1


def test_a_wrong_rule_for_a_custom_operator_is_found() -> None:
    arguments = [torch.randn(6, 6).double(), torch.randn(6).double()]
    with pytest.raises(PlanError, match="its pieces do not fit together: The size of tensor a"):
        check_rule(custom.halve, Rule("b d, b -> b d"), arguments)
    with pytest.raises(PlanError, match="put together, the pieces do not give the result 0"):
        check_rule(torch.ops.aten.cumsum.default, Rule("b d -> b d"), [arguments[0], 1])


def test_the_module_of_a_custom_operator_is_imported(tmp_path: Any) -> None:
    model = Model(_halved, up=nn.Linear(8, 8), down=nn.Linear(8, 8), weight=parameter(8))
    rules = {**DEFAULT_RULES, custom.halve: HALVE}
    bundle = compile_parallel(model, Mesh(dp=2), example_inputs=(X,), rules=rules).emit(tmp_path / "bundle")
    text = (bundle / "stages" / "stage_0.py").read_text()
    assert "import tests.custom  # noqa: F401  registers torch.ops.meshwright_tests.halve.default\n" in text
    assert "torch.ops.meshwright_tests.halve.default(up, self.weight)" in text


def test_a_rule_for_several_overloads_is_refused() -> None:
    with pytest.raises(PlanError) as error:
        compile_parallel(
            Model(_smallest, up=nn.Linear(8, 8)), Mesh(dp=2), example_inputs=(X,),
            rules={**DEFAULT_RULES, torch.ops.aten.kthvalue: Rule("... -> ...")},
        )  # fmt: skip
    assert str(error.value) == (
        "a rule for aten.kthvalue may be one for any of its overloads\n"
        "  name one of them: torch.ops.aten.kthvalue.default, torch.ops.aten.kthvalue.values"
    )


def test_all_operators_that_cannot_be_run_are_named_at_once() -> None:
    library = torch.library.Library("meshwright_nowhere", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")

    def run(self: Any, x: torch.Tensor) -> Any:
        y = self.up(x).detach()
        torch.ops.meshwright_tests.write(y)
        return self.up(torch.ops.meshwright_nowhere.twice(y)).sum()

    with pytest.raises(UnsupportedError) as error:
        compile_parallel(Model(run, up=nn.Linear(8, 8)), Mesh(dp=2), example_inputs=(X,))
    line = inspect.getsourcelines(run)[1]
    assert str(error.value) == (
        f"meshwright_tests.write.default at test_fallback.py:{line + 2} changes its arguments, which is not supported "
        "for operators that are not torch's own\n"
        "  let it return what it changes\n"
        f"meshwright_nowhere.twice.default at test_fallback.py:{line + 3} is no operator of torch's own, and no module "
        "is known whose import registers it\n"
        "  register it with torch.library.custom_op, in a module that can be imported, or choose another implementation"
    )
