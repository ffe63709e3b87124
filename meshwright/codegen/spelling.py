"""How operators are written: a table from aten to the public spelling of torch, and a fallback by the operator's
schema.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from meshwright.compiler.graph import Value
from meshwright.runtime import random

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of code with the binding strength of its outermost operator (Python's order; 20: never needs
    parentheses).
    """

    code: str
    strength: int = 20

    def at(self, strength: int) -> str:
        """The code, in parentheses where an operator of ``strength`` around it binds more strongly."""
        return self.code if self.strength >= strength else f"({self.code})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One call to be written: arguments as Text (tensors) or plain data, with the values behind them.

    Sizes among the arguments are in the symbols of the code. local: writes the size of a dim of a value as a rank has
    it; device: the code of a device at hand.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Value, ...]
    result: Value | None
    local: Callable[[Value, int], str]
    device: str

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


Spelling = Callable[[Use], Text]


def spell(use: Use) -> Text:
    """The code of one call."""
    return SPELLINGS.get(use.target, _by_schema)(use)


def plain(value: Any) -> str:
    """Data in code: numbers, dtypes, strings, sizes and sequences of them."""
    if isinstance(value, Text):
        return value.code
    if isinstance(value, (list, tuple)):
        items = ", ".join(plain(v) for v in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return repr(value)
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    if isinstance(value, str):
        return '"' + repr(value)[1:-1].replace('"', '\\"') + '"'
    return str(value) if isinstance(value, torch.dtype) else repr(value)


def _infix(symbol: str, strength: int, commutes: bool = True) -> Spelling:
    def write(use: Use) -> Text:
        left, right = (a if isinstance(a, Text) else Text(plain(a)) for a in use.args[:2])
        if use.kwargs.get("alpha", 1) != 1:
            return Text(
                f"torch.{use.target._schema.name.split('::')[1]}({left.code}, {right.code}, "
                f"alpha={use.kwargs['alpha']})"
            )
        return Text(f"{left.at(strength)} {symbol} {right.at(strength if commutes else strength + 1)}", strength)

    return write


def _function(name: str, *keywords: str) -> Spelling:
    """``name(x, ...)``: arguments beyond the tensors carry their keyword where one is given."""

    def write(use: Use) -> Text:
        written = [
            plain(a)
            for a in use.args
            if isinstance(a, Text) or (isinstance(a, (list, tuple)) and a and isinstance(a[0], Text))
        ]
        rest = [
            a
            for a in use.args
            if not isinstance(a, Text) and not (isinstance(a, (list, tuple)) and a and isinstance(a[0], Text))
        ]
        named = list(zip(keywords, rest, strict=False)) + list(use.kwargs.items())
        written += [f"{key}={plain(value)}" for key, value in named if value is not None]
        return Text(f"{name}({', '.join(written)})")

    return write


def _method(name: str, *keywords: str) -> Spelling:
    """``x.name(...)``; a keyword "" is positional, and trailing defaults are dropped by the caller."""

    def write(use: Use) -> Text:
        first: Text = use.args[0]
        written = []
        for i, value in enumerate(use.args[1:]):
            keyword = keywords[i] if i < len(keywords) else ""
            if keyword.endswith("?"):
                if value in (None, False):
                    continue
                keyword = keyword[:-1]
            written.append(f"{keyword}={plain(value)}" if keyword else plain(value))
        written += [f"{key}={plain(value)}" for key, value in use.kwargs.items() if value is not None]
        return Text(f"{first.at(20)}.{name}({', '.join(written)})")

    return write


def _negative(use: Use) -> Text:
    return Text(f"-{use.args[0].at(14)}", 14)


def _linear(use: Use) -> Text:
    return Text(f"F.linear({', '.join(a.code for a in use.args)})")


def _layer_norm(use: Use) -> Text:
    x, shape, *rest = use.args
    written = [x.code, plain(tuple(shape)), *[plain(a) for a in rest[:3]]]
    return Text(f"F.layer_norm({', '.join(written)})")


def _embedding(use: Use) -> Text:
    table, indices, *rest = use.args
    padding = f", padding_idx={rest[0]}" if rest and rest[0] >= 0 else ""
    return Text(f"F.embedding({indices.code}, {table.code}{padding})")


def _attention(use: Use) -> Text:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults: dict[str, Any] = {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    given = {**dict(zip(names, use.args, strict=False)), **use.kwargs}
    written = [given[name].code for name in names[:3]]
    written += [given["attn_mask"].code] if isinstance(given.get("attn_mask"), Text) else []
    written += [f"{k}={plain(v)}" for k, v in given.items() if k in defaults and k != "attn_mask" and v != defaults[k]]
    return Text(f"F.scaled_dot_product_attention({', '.join(written)})")


def _cat(use: Use) -> Text:
    dim = use.argument(1, "dim", 0)
    return Text(
        f"torch.cat({plain(tuple(use.args[0]))}, dim={dim})" if dim else f"torch.cat({plain(tuple(use.args[0]))})"
    )


def _slice(use: Use) -> Text:
    x, dim, start, stop, step = (*use.args, *(0, None, 2**63 - 1, 1)[len(use.args) - 1 :])  # type: ignore[misc]
    ndim = len(use.operands[0].shape)
    dim %= ndim
    stop_code = "" if stop is None or (isinstance(stop, int) and stop >= 2**62) else plain(stop)
    piece = f"{start or ''}:{stop_code}" + (f":{step}" if step != 1 else "")
    if dim == ndim - 1 and ndim > 1:
        return Text(f"{x.at(20)}[..., {piece}]")
    return Text(f"{x.at(20)}[{':, ' * dim}{piece}]")


def _select(use: Use) -> Text:
    x, dim, index = use.args
    dim %= len(use.operands[0].shape)
    return Text(f"{x.at(20)}[{':, ' * dim}{plain(index)}]")


def _index(use: Use) -> Text:
    x, indices = use.args
    return Text(f"{x.at(20)}[{', '.join(':' if index is None else index.code for index in indices)}]")


def _chunk(use: Use) -> Text:
    x, size, dim = (*use.args, *(0,)[len(use.args) - 2 :])  # type: ignore[misc]
    whole = use.operands[0].shape[dim]
    count = -(-int(whole) // int(size)) if isinstance(whole, int) else None
    if count is not None and isinstance(size, int) and int(whole) % size == 0:
        return Text(f"{x.at(20)}.chunk({count}, dim={dim})")
    return Text(f"{x.at(20)}.split({plain(size)}, dim={dim})")


def _arange(use: Use) -> Text:
    bounds = ", ".join(plain(a) for a in use.args)
    dtype = use.kwargs.get("dtype")
    extra = f", dtype={dtype}" if dtype not in (None, torch.int64) else ""
    return Text(f"torch.arange({bounds}{extra}, device={use.device})")


def _filled(name: str) -> Spelling:
    def write(use: Use) -> Text:
        assert use.result is not None
        sizes = [use.local(use.result, dim) for dim in range(len(use.result.shape))]
        shape = f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
        fill = f", {plain(use.args[1])}" if name == "full" else ""
        return Text(f"torch.{name}({shape}{fill}, dtype={use.result.dtype}, device={use.device})")

    return write


def _runtime(use: Use) -> Text:
    written = [plain(a) for a in use.args] + [f"{k}={plain(v)}" for k, v in use.kwargs.items()]
    return Text(f"{use.target.__name__}({', '.join(written)})")


def _cross_entropy(use: Use) -> Text:
    return _function("F.cross_entropy")(use)


def _masked_fill(use: Use) -> Text:
    x, mask, value = use.args
    return Text(f"{x.at(20)}.masked_fill({plain(mask)}, {plain(value)})")


def _permute(use: Use) -> Text:
    return Text(f"{use.args[0].at(20)}.permute({', '.join(str(d) for d in use.args[1])})")


def _pad(use: Use) -> Text:
    x, amounts, mode, value = (*use.args, *("constant", None)[len(use.args) - 2 :])  # type: ignore[misc]
    assert use.result is not None
    if isinstance(value, float) and not use.result.dtype.is_floating_point:
        value = int(value)
    extra = ("" if mode == "constant" else f", mode={plain(mode)}") + ("" if not value else f", value={plain(value)}")
    return Text(f"F.pad({x.code}, {plain(tuple(amounts))}{extra})")


def _by_schema(use: Use) -> Text:
    """``torch.name(...)``, else ``F.name(...)``, else the method, with keywords for what is not positional."""
    if not isinstance(use.target, torch._ops.OpOverload):
        return _runtime(use)
    name = use.target._schema.name.split("::")[1]
    skipped = {"device", "layout", "pin_memory", "memory_format"}
    arguments = list(use.target._schema.arguments)
    positional = [a for a in arguments if not a.kwarg_only]
    kwargs = {k: v for k, v in use.kwargs.items() if k not in skipped and v is not None}
    values = list(use.args)
    while (
        values
        and len(values) > 1
        and not isinstance(values[-1], Text)
        and values[-1] == positional[len(values) - 1].default_value
    ):
        values.pop()
    written = [plain(a) for a in values] + [f"{k}={plain(v)}" for k, v in kwargs.items()]
    for family in ("fft", "linalg", "special"):
        if name.startswith(f"{family}_"):
            return Text(f"torch.{family}.{name.removeprefix(family + '_')}({', '.join(written)})")
    if not use.target._schema.name.startswith("aten::"):
        return Text(f"torch.ops.{use.target}({', '.join(written)})")
    owner = next((o for o, m in (("torch", torch), ("F", F)) if hasattr(m, name)), None)
    if owner is not None:
        return Text(f"{owner}.{name}({', '.join(written)})")
    if hasattr(torch.Tensor, name):
        return Text(f"{values[0].at(20)}.{name}({', '.join(written[1:])})")
    return Text(f"torch.ops.{use.target}({', '.join(written)})")


def _in_training(position: int) -> Spelling:
    """A function of the runtime whose argument at ``position`` says that the model is in training."""

    def write(use: Use) -> Text:
        args = [Text("self.training") if i == position else a for i, a in enumerate(use.args)]
        return _runtime(replace(use, args=tuple(args)))

    return write


def _drawn(use: Use) -> Text:
    """Noise of a shape of its own, as a rank has it."""
    assert use.result is not None
    sizes = [use.local(use.result, dim) for dim in range(len(use.result.shape))]
    shape = f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
    return Text(f"{use.target.__name__}({shape}, {plain(use.args[1])}, dtype={use.result.dtype}, device={use.device})")


SPELLINGS: Mapping[Any, Spelling] = {
    aten.add.Tensor: _infix("+", 12),
    aten.sub.Tensor: _infix("-", 12, commutes=False),
    aten.mul.Tensor: _infix("*", 13),
    aten.mul.Scalar: _infix("*", 13),
    aten.div.Tensor: _infix("/", 13, commutes=False),
    aten.div.Scalar: _infix("/", 13, commutes=False),
    aten.matmul.default: _infix("@", 13, commutes=False),
    aten.mm.default: _infix("@", 13, commutes=False),
    aten.bmm.default: _infix("@", 13, commutes=False),
    aten.bitwise_and.Tensor: _infix("&", 10),
    aten.bitwise_or.Tensor: _infix("|", 8),
    aten.eq.Scalar: _infix("==", 7),
    aten.ne.Scalar: _infix("!=", 7),
    aten.lt.Scalar: _infix("<", 7),
    aten.le.Scalar: _infix("<=", 7),
    aten.gt.Scalar: _infix(">", 7),
    aten.ge.Scalar: _infix(">=", 7),
    aten.eq.Tensor: _infix("==", 7),
    aten.ne.Tensor: _infix("!=", 7),
    aten.lt.Tensor: _infix("<", 7),
    aten.le.Tensor: _infix("<=", 7),
    aten.gt.Tensor: _infix(">", 7),
    aten.ge.Tensor: _infix(">=", 7),
    aten.neg.default: _negative,
    aten.bitwise_not.default: lambda use: Text(f"~{use.args[0].at(14)}", 14),
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.embedding.default: _embedding,
    aten.scaled_dot_product_attention.default: _attention,
    F.cross_entropy: _cross_entropy,
    random.dropout: _in_training(2),
    random.feature_dropout: _in_training(2),
    random.alpha_dropout: _in_training(2),
    random.feature_alpha_dropout: _in_training(2),
    random.attention_with_dropout: _in_training(4),
    random.rand: _drawn,
    random.randn: _drawn,
    aten.softmax.int: _function("F.softmax", "dim", "dtype"),
    aten.log_softmax.int: _function("F.log_softmax", "dim", "dtype"),
    aten.silu.default: _function("F.silu"),
    aten.gelu.default: _function("F.gelu"),
    aten.relu.default: _function("F.relu"),
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.split.Tensor: _chunk,
    aten.pad.default: _pad,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.zeros.default: _filled("zeros"),
    aten.ones.default: _filled("ones"),
    aten.full.default: _filled("full"),
    aten.to.dtype: lambda use: Text(f"{use.args[0].at(20)}.to({use.args[1]})"),
    aten.transpose.int: _method("transpose"),
    aten.unsqueeze.default: _method("unsqueeze"),
    aten.squeeze.dim: _method("squeeze"),
    aten.permute.default: _permute,
    aten.detach.default: _method("detach"),
    aten.masked_fill.Scalar: _masked_fill,
    aten.pow.Tensor_Scalar: _method("pow"),
    aten.mean.dim: lambda use: _reduction("mean", use),
    aten.mean.default: _method("mean"),
    aten.sum.dim_IntList: lambda use: _reduction("sum", use),
    aten.sum.default: _method("sum"),
    aten.logsumexp.default: lambda use: _reduction("logsumexp", use),
    aten.cumsum.default: _method("cumsum"),
    aten.gather.default: _method("gather"),
    aten.cos.default: _method("cos"),
    aten.sin.default: _method("sin"),
    aten.tanh.default: _function("torch.tanh"),
    aten.rsqrt.default: _function("torch.rsqrt"),
}


def _reduction(name: str, use: Use) -> Text:
    dims = use.args[1]
    code = (
        plain(dims[0])
        if isinstance(dims, (list, tuple)) and len(dims) == 1
        else plain(tuple(dims) if dims is not None else None)
    )
    keepdim = ", keepdim=True" if use.argument(2, "keepdim", False) else ""
    dtype = f", dtype={use.kwargs['dtype']}" if use.kwargs.get("dtype") else ""
    return Text(f"{use.args[0].at(20)}.{name}({code}{keepdim}{dtype})")
