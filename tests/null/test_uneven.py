"""Pieces of different length: where a dim is not a multiple of the ranks, all pieces are equal but the last."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright import Mesh, Plan, compile_parallel
from meshwright.runtime import all_gather
from tests.hard import LENGTH, OddSizes
from tests.null.passes import Model, check_exact, lowered, parameter, typed

X = torch.randn(4, 6, 8)
TOKENS = torch.randint(21, (4, LENGTH))
LABELS = torch.where(torch.rand(4, LENGTH) < 0.3, -100, TOKENS)


def _perceptron(hidden: int = 7) -> nn.Module:
    return Model(
        lambda self, x: (x + self.down(torch.tanh(self.up(x)))).pow(2).sum(),
        up=nn.Linear(8, hidden), down=nn.Linear(hidden, 8),
    )  # fmt: skip


def _pinned(**types: str) -> Plan:
    return Plan(pins={name: {"tp": type_} for name, type_ in types.items()})


def _softmax(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.up).softmax(-1).pow(3).sum()  # type: ignore[arg-type]


def _partial(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A sum over a split dim that meets an uneven split."""
    return (F.linear(F.linear(x, self.up), self.down) * self.scale).pow(2).sum()  # type: ignore[arg-type, operator]


def _tied(self: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(torch.tanh(F.embedding(tokens, self.table)), self.table)  # type: ignore[arg-type]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...], Plan | None]] = {
    "column, then row": (_perceptron, (X,), None),
    "gathered": (lambda: Model(_softmax, up=parameter(7, 8)), (X,), _pinned(up="S(0)")),
    "rows alone": (_perceptron, (X,), _pinned(**{"down.weight": "S(0)", "up.weight": "I"})),
    "columns alone": (_perceptron, (X,), _pinned(**{"up.weight": "S(0)", "down.weight": "S(0)"})),
    "a sum scattered": (
        lambda: Model(_partial, up=parameter(16, 8), down=parameter(7, 16), scale=parameter(7)),
        (X,),
        _pinned(up="S(0)", down="S(1)", scale="S(0)"),
    ),
    "vocabulary": (lambda: Model(_tied, table=parameter(21, 8)), (TOKENS, LABELS), _pinned(table="S(0)")),
    "heads": (OddSizes, (TOKENS, LABELS), None),
    "heads, pinned": (OddSizes, (TOKENS, LABELS), _pinned(**{"query.weight": "S(0)", "head.weight": "S(0)"})),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(name: str, ranks: int) -> None:
    build, batch, plan = CASES[name]
    torch.manual_seed(0)
    check_exact(build(), batch, plan, tp=ranks)


def _held(hidden: int, ranks: int) -> dict[str, str]:
    parameters = lowered(_perceptron(hidden), (X,), tp=ranks).parameters
    return {name: str(placed.held["tp"]) for name, placed in parameters.items()}


def test_what_does_not_divide_is_split_like_what_does() -> None:
    assert {_held(7, ranks)["up.weight"] for ranks in (2, 4)} == {_held(8, 2)["up.weight"]} == {"S(0)"}


def test_a_rank_without_a_piece_is_no_choice() -> None:
    assert _held(16, 8)["up.weight"] == "S(0)"
    assert _held(9, 8)["up.weight"] != "S(0)", "9 in pieces of 2 are 5 pieces"


def test_conversions_are_told_the_size() -> None:
    blocks = typed(Model(_softmax, up=parameter(7, 8)), (X,), _pinned(up="S(0)"), tp=2)
    calls = [(node.target, node.kwargs) for node in blocks.main.graph.nodes if "size" in node.kwargs]
    assert calls == [(all_gather, {"dim": 2, "size": 7, "to": "I"})]


def test_gpt2s_vocabulary_is_split() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    program = compile_parallel(model, Mesh(tp=2), example_inputs={"input_ids": tokens, "labels": tokens})
    assert str(program.lowered.parameters["transformer.wte.weight"].held["tp"]) == "S(0)", "50257 rows"
