"""What the nodes of a model cost by the model of costs, and what a forward keeps, beside what autograd keeps."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from meshwright import Plan
from meshwright.passes.cost import FLOPS, LATENCY, LINK_BANDWIDTH, Times
from meshwright.passes.partition import partition
from meshwright.passes.timing import Timing, costs, edges
from tests import models
from tests.null.passes import Model, timed_blocks

X = torch.randn(8, 64)


def by_name(model: nn.Module, plan: Plan | None = None, **mesh: int) -> tuple[dict[str, Times], Timing]:
    _, timing = timed_blocks(model, (X,), plan, **mesh)
    return {node.name: times for node, times in timing.times.items()}, timing


def perceptron() -> nn.Module:
    up, down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)
    return Model(lambda self, x: self.down(self.up(x).relu()).softmax(-1).sum(), up=up, down=down)


def test_a_product_takes_as_long_for_each_operand_with_a_gradient() -> None:
    """The input of the first has none; 4096 tokens, and features that count as 8192 where there are 64."""
    times, _ = by_name(perceptron())
    forward = 2 * 4096 * (256 * 128) * (64 * 128) / FLOPS
    assert times["linear_default"] == pytest.approx((forward, 0.0, forward))
    assert times["linear_default_1"] == pytest.approx((forward, forward, forward))
    relu = times["relu_default"]
    assert relu.forward == relu.inputs > 0 and relu.weights == 0.0


def test_a_microbatch_of_a_replica_counts_the_same_in_any_number() -> None:
    one, _ = by_name(perceptron())
    many, _ = by_name(perceptron(), Plan(microbatches=2), dp=2)
    assert one.keys() == many.keys() - {"part_of_mean"} and all(one[name] == pytest.approx(many[name]) for name in one)


def test_tp_divides_the_products_and_adds_collectives() -> None:
    whole, _ = by_name(perceptron())
    cut, _ = by_name(perceptron(), tp=2)
    assert cut["linear_default"] == pytest.approx(whole["linear_default"] * 0.5)
    assert cut["linear_default_1"] == pytest.approx(whole["linear_default_1"] * 0.5)
    wire = 4096 * 64 * 128 * 2 / LINK_BANDWIDTH  # twice the half that each rank has
    assert cut["all_reduce"] == pytest.approx((LATENCY + wire, 0.0, 0.0))


def test_updates_are_shared_by_the_microbatches_of_a_step_and_by_replicas_under_zero() -> None:
    def updates(plan: Plan) -> float:
        _, timing = by_name(perceptron(), plan, dp=2)
        return sum(timing.seconds.values()) - sum(map(sum, timing.times.values()))

    once = updates(Plan(microbatches=1))
    assert once > 0
    assert updates(Plan(microbatches=4)) == pytest.approx(once / 4)
    assert updates(Plan(microbatches=1, zero=1)) == pytest.approx(once / 2)


def kept_by_torch(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """The bytes of all memory that autograd keeps, without parameters, buffers and the batch."""
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other has its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in there)


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2"])
def test_what_a_forward_keeps_is_what_autograd_keeps(name: str) -> None:
    """Within a tenth: kernels of the CPU keep statistics, and spread keys where the graph does not."""
    model, batch = models.build(name), models.batch(name)
    blocks, timing = timed_blocks(model, batch)
    assert timing.saved.of(blocks.main.graph.nodes) == pytest.approx(kept_by_torch(model, batch), rel=0.1)


def test_views_and_what_several_keep_count_once() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        hidden = self.up(x)
        return (hidden.view(-1, 4, 64).transpose(1, 2) * 2 + 1).pow(2).sum() + hidden.pow(3).sum() + hidden.exp().sum()

    blocks, timing = timed_blocks(Model(run, up=nn.Linear(64, 256)), (X,))
    hidden = 8 * 256 * 4
    # hidden, of which the view is one; 2 h + 1; exp(h), the results
    assert timing.saved.of(blocks.main.graph.nodes) == 3 * hidden


def test_what_is_kept_is_of_one_microbatch_and_piece() -> None:
    def kept(plan: Plan, **mesh: int) -> int:
        blocks, timing = timed_blocks(perceptron(), (X,), plan, **mesh)
        return timing.saved.of(blocks.main.graph.nodes)

    inner, outer = 8 * 256 * 4, 8 * 64 * 4  # of relu, which the second product keeps too, and of softmax; x is none
    assert kept(Plan(microbatches=1)) == inner + outer
    assert kept(Plan(microbatches=4)) == (inner + outer) // 4
    assert kept(Plan(microbatches=2), dp=2, tp=2) == inner // 8 + outer // 4


def test_costs_of_stages_are_sums_and_shared_memory_counts_in_each() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(4))

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        mask = (x > 0).float()
        for layer in self.layers:
            x = layer(x)
        return (x * mask).sum()

    blocks, timing = timed_blocks(Model(run, layers=layers), (X,), Plan(microbatches=1), pp=2)
    parts = partition(blocks, 2, None, timing.seconds)
    found = costs(parts, timing)
    assert edges(blocks, parts) == ((0, 1, True),)
    for kind in Times._fields:
        every = sum(getattr(times, kind) for times in timing.times.values())
        assert sum(getattr(found, kind)) == pytest.approx(every)
    hidden = 8 * 64 * 4
    # Of two layers each the input, unless it is the batch, and what tanh makes; behind the last the mask.
    assert found.activations == (3 * hidden, 5 * hidden)
    assert found.message == pytest.approx(LATENCY + 4096 * 64 * 128 * 2 / LINK_BANDWIDTH)
