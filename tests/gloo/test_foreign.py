"""Operators of other libraries in emitted programs equal one device, without a rule and with one."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshwright import DEFAULT_RULES, Mesh, Plan, Rule, compile_parallel
from tests import custom
from tests.gloo import parity
from tests.gloo.pool import OneProcess


class Halved(nn.Module):
    """An operator of the user's own between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(custom.halve(self.up(x), self.weight)).pow(2).mean()  # type: ignore[no-any-return]


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0,
            sliding_window=None,
        )
    )  # fmt: skip


def _check(
    threads: OneProcess, directory: Path, model: nn.Module, batch: dict[str, Any], rules: Any, wanted: Any, **mesh: int
) -> dict[str, str]:
    """Compare with one device; returns the types of the parameters over tp."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = Plan(precision="fp64")
        program = compile_parallel(model, Mesh(**mesh), example_inputs=batch, plan=plan, rules=rules)
    program.emit(directory)
    parity.compare(
        threads.run("tests.gloo.parity:train", (str(directory), batch), ranks=parity.num_ranks(mesh)), wanted
    )
    return {name: str(placed.held.get("tp")) for name, placed in program.lowered.parameters.items()}


@pytest.mark.gloo
@pytest.mark.parametrize(
    "rules", [{}, {custom.halve: Rule("... d, d -> ... d", linear=((0,), (1,)))}], ids=["", "rule"]
)
def test_a_custom_operator_equals_one_device(rules: Any, threads: OneProcess, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Halved(), {"x": torch.randn(4, 6, 8)}
    every = {**DEFAULT_RULES, **rules}
    program = (threads, tmp_path / "bundle", model, batch, every)
    wanted = parity.reference(_copied(model), batch)
    assert _check(*program, wanted, dp=2, tp=2)["weight"] == ("S(0)" if rules else "I -> R")


def _copied(model: nn.Module) -> nn.Module:
    other = Halved()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.gloo
def test_experts_of_transformers_own_are_split_inside(threads: OneProcess, tmp_path: Path) -> None:
    """The reference computes its experts otherwise: this operator takes no float64 outside of a captured program."""
    tokens = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens}
    single: Any = _mixtral()
    single.set_experts_implementation("batched_mm")
    model = _mixtral()
    product = Rule("t! k, e! k n, e! -> t! n", linear=((0,), (1,)))
    rules = {**DEFAULT_RULES, torch.ops.transformers.grouped_mm_fallback: product}
    types = _check(threads, tmp_path / "bundle", model, batch, rules, parity.reference(single, batch), dp=2, tp=2)
    experts = "model.layers.0.mlp.experts"
    assert types[f"{experts}.gate_up_proj"] == "S(1/2)" and types[f"{experts}.down_proj"] == "S(2)"
