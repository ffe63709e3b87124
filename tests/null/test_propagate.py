"""The compiler finds the plans that people write by hand, at toy size and at real size."""

import collections
from typing import Any

import pytest
import torch

from meshwright import Mesh, Plan, PlanError, compile_parallel
from meshwright.compiler.program import Lowered
from meshwright.passes.reshard import conversion_of
from tests import models


def _compiled(name: str, mesh: dict[str, int], num_layers: int = 2, **plan: Any) -> Lowered:
    model = models.build(name, num_layers)
    program = compile_parallel(model, Mesh(**mesh), example_inputs=models.batch(name), plan=Plan(**plan))
    return program.lowered


def _types(lowered: Lowered, axis: str = "tp") -> dict[str, str]:
    return {name: str(placed.held[axis]) for name, placed in lowered.parameters.items()}


def _conversions(lowered: Lowered) -> dict[str, int]:
    """The conversions of one layer, by function and types."""
    (block,) = {id(b): b for b in lowered.blocks.values()}.values()
    counts: collections.Counter[str] = collections.Counter()
    for node in block.function.graph.nodes:
        if conversion_of(node):
            counts[node.target.__name__] += 1
    return dict(counts)


def test_llama_gets_the_plan_of_megatron() -> None:
    lowered = _compiled("llama", {"tp": 2})
    types = _types(lowered)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            assert types[f"{prefix}.{name}.weight"] == "S(0)"
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert types[f"{prefix}.{name}.weight"] == "S(1)"
        assert types[f"{prefix}.input_layernorm.weight"] == "I"
    assert types["lm_head.weight"] == "S(0)"
    # two sums forward, two backward
    assert _conversions(lowered) == {"invariant_to_replicated": 2, "all_reduce": 2}


def test_gpt2_splits_its_fused_projection_in_groups() -> None:
    types = _types(lowered := _compiled("gpt2", {"tp": 2}))
    assert types["transformer.h.0.attn.c_attn.weight"] == "S(1/3)"
    assert types["transformer.h.0.attn.c_attn.bias"] == "S(0/3)"
    assert types["transformer.h.0.attn.c_proj.weight"] == "S(0)"
    assert types["transformer.h.0.attn.c_proj.bias"] == "I"
    assert types["transformer.h.0.mlp.c_fc.weight"] == "S(1)"
    assert types["transformer.h.0.mlp.c_proj.weight"] == "S(0)"
    assert types["transformer.wte.weight"] == "S(0)", "tied: rows for the embedding are classes for the head"
    assert _conversions(lowered) == {"invariant_to_replicated": 2, "all_reduce": 2}


def test_falcon_cuts_its_fused_projection_in_segments() -> None:
    types = _types(lowered := _compiled("falcon", {"tp": 2}))
    fused = "transformer.h.0.self_attention.query_key_value.weight"
    assert types[f"{fused}[0:64]"] == "S(0)"
    assert types[f"{fused}[64:80]"] == types[f"{fused}[80:96]"] == "I -> R", "the one key and value head is whole"
    assert _conversions(lowered) == {"invariant_to_replicated": 1, "all_reduce": 1}


def test_the_sequence_is_split_where_that_is_permitted() -> None:
    lowered = _compiled("llama", {"tp": 2}, sequence_parallel=True)
    assert _conversions(lowered) == {"all_gather": 2, "reduce_scatter": 2}
    assert _types(lowered)["model.layers.0.input_layernorm.weight"] == "I -> R"


def test_few_key_value_heads_are_replicated() -> None:
    types = _types(_compiled("llama", {"tp": 4}))
    assert types["model.layers.0.self_attn.q_proj.weight"] == "S(0)"
    assert types["model.layers.0.self_attn.k_proj.weight"] == "I -> R"


@pytest.mark.parametrize("hidden", [64, 1024, 8192])
def test_toy_sizes_get_the_plan_of_real_sizes(hidden: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4 * hidden, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    lowered = compile_parallel(model, Mesh(tp=2), example_inputs={"input_ids": tokens, "labels": tokens}).lowered
    types = _types(lowered)
    found = {n: types[f"model.layers.1.{n}.weight"] for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
    assert found == {"self_attn.q_proj": "S(0)", "self_attn.o_proj": "S(1)", "mlp.down_proj": "S(1)"}
    assert _conversions(lowered) == {"invariant_to_replicated": 2, "all_reduce": 2}


def test_pins_override() -> None:
    lowered = _compiled("llama", {"tp": 2}, pins={"*.mlp.*.weight": {"tp": "I"}})
    types = _types(lowered)
    assert {types[f"model.layers.{i}.mlp.{n}_proj.weight"] for i in range(2) for n in ("gate", "up", "down")} <= {
        "I",
        "I -> R",
    }
    assert types["model.layers.0.self_attn.q_proj.weight"] == "S(0)"


def test_a_pin_on_one_layer_makes_a_block_of_its_own() -> None:
    lowered = _compiled("llama", {"tp": 2}, num_layers=3, pins={"model.layers.1.mlp.*": {"tp": "I"}})
    assert len({block.name for block in lowered.blocks.values()}) == 1, "the odd layer stands alone, inline"
    assert _types(lowered)["model.layers.0.mlp.up_proj.weight"] == "S(0)"
    assert _types(lowered)["model.layers.1.mlp.up_proj.weight"] in ("I", "I -> R")


def test_contradicting_pins_are_both_named() -> None:
    with pytest.raises(PlanError) as error:
        _compiled("llama", {"tp": 2}, pins={"*.up_proj.weight": {"tp": "S(0)"}, "*.mlp.*": {"tp": "S(1)"}})
    assert str(error.value) == (
        "two pins contradict each other on 'model.layers.0.mlp.up_proj.weight': '*.up_proj.weight' wants tp=S(0), "
        "'*.mlp.*' wants tp=S(1)\n  keep one of them"
    )


def test_a_pin_that_leaves_a_rank_without_a_piece_is_an_error() -> None:
    with pytest.raises(PlanError) as error:
        compile_parallel(
            models.MLP(width=5), Mesh(tp=4), example_inputs={"features": torch.randn(8, 5), "targets": torch.randn(8)},
            plan=Plan(pins={"head.weight": {"tp": "S(1)"}}),
        )  # fmt: skip
    assert str(error.value) == (
        "cannot split 'head.weight' as S(1) over tp=4: its shape is (1, 5) and 5 has no 4 pieces of "
        "which only the last is shorter\n"
        "  asked for by the pin 'head.weight'\n"
        '  pin it whole, {"head.weight": {"tp": "I"}}, or leave the choice to the compiler'
    )


def test_a_pin_of_groups_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(
        PlanError, match=r"^cannot split 'head.weight' as S\(1/2\) over tp=4: its shape is \(1, 6\) and 6 is not a"
    ):
        compile_parallel(
            models.MLP(width=6), Mesh(tp=4), example_inputs={"features": torch.randn(8, 6), "targets": torch.randn(8)},
            plan=Plan(pins={"head.weight": {"tp": "S(1/2)"}}),
        )  # fmt: skip
