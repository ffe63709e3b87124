"""Operators whose batch, channels or features are split after a rewrite, or with lines of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright.compiler.blocks import Blocks
from meshwright.runtime import all_gather
from tests.null.passes import Model, check_exact, parameter

X = torch.randn(4, 6, 8)
IDS = torch.randint(6, (4, 6))
Run = Callable[..., Any]


def _gathered(blocks: Blocks, axis: str) -> bool:
    """Whether an operand with a gradient is made whole on an axis."""
    nodes = [node for node in blocks.main.graph.nodes if node.target is all_gather and node.args[1] == axis]
    return any(blocks.main.values[node].grad for node in nodes)


def _weights(count: int) -> torch.Tensor:
    return torch.linspace(0.5, 2.0, count, dtype=torch.float64)


ALONE: Mapping[str, Run] = {
    "normalize": lambda self, x: F.normalize(self.up(x), dim=-1).pow(3),
    "movedim": lambda self, x: self.up(x).movedim(1, 2).softmax(-1).pow(2),
    "swapaxes": lambda self, x: self.up(x).swapaxes(1, 2).softmax(-1).pow(2),
    "moveaxis": lambda self, x: self.up(x).moveaxis(0, -1).softmax(1).pow(2),
    "narrow": lambda self, x: self.up(x).narrow(1, 2, 3).pow(2),
    "tensor_split": lambda self, x: torch.tensor_split(self.up(x), 3, -1)[2].pow(2),
    "hsplit": lambda self, x: torch.hsplit(self.up(x), 2)[1].pow(2),
    "adjoint": lambda self, x: (self.up(x).adjoint() @ x).pow(2),
    "quantile": lambda self, x: torch.quantile(self.up(x), 0.3, dim=-1),
    "addmv": lambda self, x: torch.addmv(x[:, 0, 0], self.up(x[:, 1]), x[0, 0], beta=0.5, alpha=2.0).pow(2),
    "addr": lambda self, x: torch.addr(self.up(x[:, 1]), x[:, 0, 0], x[0, 0], beta=0.5, alpha=2.0).pow(2),
    "each soft target": lambda self, x: F.cross_entropy(
        self.up(x), x.softmax(1), reduction="none", label_smoothing=0.1
    ).pow(2),
    "each smoothed label": lambda self, x: F.cross_entropy(
        self.up(x).mT,
        x.argmax(-1),
        weight=_weights(8),
        ignore_index=2,
        reduction="none",
        label_smoothing=0.1,
    ).pow(2),
    "each likelihood": lambda self, x: F.nll_loss(self.up(x).mT.log_softmax(1), x.argmax(-1), reduction="none").pow(2),
    "hinge": lambda self, x: F.hinge_embedding_loss(self.up(x), x.sign()),
    "margin": lambda self, x: F.multi_margin_loss(self.up(x).flatten(0, 1), x.argmax(-1).flatten()),
    "unsqueeze_": lambda self, x: self.up(x).clone().unsqueeze_(1).mul_(2).squeeze_(1).pow(2),
    "transpose_": lambda self, x: self.up(x).clone().transpose_(1, 2).softmax(-1).pow(2),
    "fill_ of a diagonal": lambda self, x: _written(self.up(x), lambda y: y[:, :, :6].diagonal(0, 1, 2).fill_(1.0)),
    "mul_ of a narrow": lambda self, x: _written(self.up(x), lambda y: y.narrow(1, 1, 2).mul_(2.0)),
    "setitem by indices": lambda self, x: _written(
        self.up(x), lambda y: y.__setitem__((slice(None), [0, 3]), x[:, :2])
    ),
    "index_add_": lambda self, x: _written(self.up(x), lambda y: y.index_add_(1, torch.tensor([0, 3]), x[:, :2])),
    "lstm": lambda self, x: torch.relu(self.rnn(self.up(x))[0]).pow(2),
    "the last state of an lstm": lambda self, x: self.rnn(self.up(x))[1][1].pow(2),
    "a cell of an lstm": lambda self, x: self.cell(self.up(x[:, 0]))[0].pow(2),
    "matrix_power": lambda self, x: torch.linalg.matrix_power(self.up(x)[:, :, :6], 3),
    "rsub": lambda self, x: torch.rsub(self.up(x), x).pow(2),
}


def _written(x: torch.Tensor, write: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    y = x.clone()
    write(y)
    return y.pow(2)


@pytest.mark.parametrize("name", ALONE)
def test_samples_stay_apart(name: str) -> None:
    members: dict[str, Any] = {"cell": nn.LSTMCell(8, 8)} if name.startswith("a cell") else {}
    if name.endswith("lstm") and not members:
        members = {"rnn": nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True)}
    model = Model(lambda self, x: ALONE[name](self, x).sum(), up=nn.Linear(8, 8), **members)
    assert not _gathered(check_exact(model, (X,), dp=2, tp=2), "dp")


def test_the_diagonal_of_a_matrix_is_filled() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        y = self.up(x).flatten(0, 1)
        return (y.mT @ y).fill_diagonal_(0.5).pow(2).sum()

    check_exact(Model(run, up=nn.Linear(8, 8)), (X,), dp=2, tp=2)


def test_sizes_that_are_alike_for_some_batches_only_are_no_broadcast() -> None:
    """Frames of a signal have a size that is the batch's, though it is not written so: it was taken for a size of 1."""
    model = Model(
        lambda self, x: torch.stft(
            self.up(x).flatten(1), 8, 4, window=torch.ones(8, dtype=x.dtype), return_complex=True
        ).abs().sum(),
        up=nn.Linear(8, 8),
    )  # fmt: skip
    check_exact(model, (X,), dp=2)


# Embedding bags


def _bag(**options: Any) -> nn.Module:
    return Model(
        lambda self, ids: self.head(self.bag(ids)).pow(2).mean(),
        bag=nn.EmbeddingBag(6, 8, **options), head=nn.Linear(8, 8),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"mode": "sum"}, {"mode": "mean"}, {"mode": "max"}, {"mode": "sum", "padding_idx": 1},
     {"mode": "mean", "padding_idx": 1}],
    ids=str,
)  # fmt: skip
def test_bags_of_equal_size_are_reduced_sample_by_sample(options: dict[str, Any]) -> None:
    blocks = check_exact(_bag(**options), (IDS,), dp=2)
    assert not any(node.target is all_gather for node in blocks.main.graph.nodes)


def test_weighted_bags() -> None:
    model = Model(
        lambda self, x: self.bag((x[..., 0] > 0).long(), per_sample_weights=self.up(x)[..., 0]).pow(2).mean(),
        bag=nn.EmbeddingBag(6, 8, mode="sum"), up=nn.Linear(8, 8),
    )  # fmt: skip
    assert not _gathered(check_exact(model, (X,), dp=2), "dp")


@pytest.mark.parametrize("axis", ["dp", "tp"])
def test_bags_by_offsets_have_their_features_split(axis: str) -> None:
    model = Model(
        lambda self, ids: self.head(self.bag(ids.flatten(), torch.arange(0, ids.numel(), 3))).pow(2).mean(),
        bag=nn.EmbeddingBag(6, 8, mode="mean"), head=nn.Linear(8, 8),
    )  # fmt: skip
    check_exact(model, (IDS,), None, **{axis: 2})


# Groups of channels


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_channels_are_split(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    model = Model(
        lambda self, x: self.last(torch.relu(self.middle(torch.relu(self.first(x))))).pow(2).mean(),
        first=nn.Conv1d(6, 8, 3), middle=kind(8, 8, 3, groups=groups), last=nn.Conv1d(8, 6, 1, bias=False),
    )  # fmt: skip
    blocks = check_exact(model, (X,), dp=2, tp=2)
    assert groups == 1 or not any(_gathered(blocks, axis) for axis in ("dp", "tp"))


def test_groups_are_normalized_in_pieces() -> None:
    model = Model(
        lambda self, x: self.last(self.norm(self.first(x))).pow(2).mean(),
        first=nn.Conv1d(6, 8, 3), norm=nn.GroupNorm(4, 8), last=nn.Conv1d(8, 6, 3, bias=False),
    )  # fmt: skip
    blocks = check_exact(model, (X,), dp=2, tp=2)
    assert not any(_gathered(blocks, axis) for axis in ("dp", "tp"))
    (norm,) = (node for node in blocks.main.graph.nodes if "group_norm" in str(node.target))
    assert norm.args[1] == 2, "each rank has half of the groups"


# Losses that need more than one tensor of the batch


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ctc_loss_of_every_sample(reduction: str) -> None:
    def run(self: Any, x: torch.Tensor, labels: torch.Tensor) -> Any:
        lengths = torch.full((x.shape[0],), 13)
        logarithms = self.up(x).transpose(0, 1).log_softmax(-1)
        return F.ctc_loss(logarithms, labels, lengths, (labels > 0).sum(1), reduction=reduction).mean()

    labels = torch.zeros(4, 13).long()
    labels[:, :3] = torch.randint(1, 8, (4, 3))
    blocks = check_exact(Model(run, up=nn.Linear(8, 8)), (torch.randn(4, 13, 8), labels), dp=2)
    assert not _gathered(blocks, "dp")


def test_experts_as_one_product_of_groups() -> None:
    """Features in and out of the experts are split, their choice is not."""
    from meshwright import Mesh, compile_parallel

    def run(self: Any, x: torch.Tensor) -> Any:
        tokens = x.flatten(0, 1)
        order = (tokens @ self.router).argmax(-1).argsort()
        counts = F.one_hot((tokens @ self.router).argmax(-1), 2).sum(0).cumsum(0).to(torch.int32)
        hidden = F.silu(torch._grouped_mm(tokens[order], self.up, offs=counts))
        return torch._grouped_mm(hidden, self.down, offs=counts).float().pow(2).mean()

    members = {"router": parameter(8, 2), "up": parameter(2, 8, 32), "down": parameter(2, 32, 8)}
    model = Model(run, **members).to(torch.bfloat16)
    lowered = compile_parallel(model, Mesh(tp=2), example_inputs=(torch.randn(4, 8, 8).bfloat16(),)).lowered
    assert str(lowered.parameters["up"].held["tp"]) == "S(2)"
    assert str(lowered.parameters["down"].held["tp"]) == "S(1)"
