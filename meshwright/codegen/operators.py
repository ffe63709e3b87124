"""The public spelling of operators: a table from aten, and what takes more than a line of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from meshwright.codegen.spelling import (
    Spelling,
    Text,
    Use,
    by_schema,
    function,
    infix,
    method,
    plain,
    reduction,
    runtime,
)
from meshwright.runtime import buffers, random

aten = torch.ops.aten


def spell(use: Use) -> Text:
    """The code of one call."""
    return SPELLINGS.get(use.target, by_schema)(use)


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


def _cross_entropy(use: Use) -> Text:
    return function("F.cross_entropy")(use)


def _loss(use: Use) -> Text:
    """Reductions are numbers in aten and words in public; what is not a tensor to compare goes by its name."""
    name, arguments = use.target._schema.name.split("::")[1], use.target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), use.args, strict=False)) | dict(use.kwargs)
    first, second, *rest = ((a.name, given[a.name], a.default_value) for a in arguments if a.name in given)
    words = [
        f"{key}={plain(REDUCTIONS[value] if key == 'reduction' else value)}"
        for key, value, default in rest
        if isinstance(value, Text) or value != default
    ]
    return Text(f"F.{name}({', '.join([first[1].code, second[1].code, *words])})")


REDUCTIONS = ("none", "mean", "sum")
LOSSES = (
    aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
    aten.soft_margin_loss.default, aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default,
    aten.kl_div.default, aten.multi_margin_loss.default, aten.multilabel_margin_loss.default, aten.ctc_loss.Tensor,
)  # fmt: skip


def _interpolated(mode: str, **options: bool) -> Spelling:
    """Interpolation to a size or by a factor, by its mode."""

    def write(use: Use) -> Text:
        arguments = use.target._schema.arguments
        given = dict(zip((argument.name for argument in arguments), use.args, strict=False)) | dict(use.kwargs)
        written = {
            "size": given["output_size"],
            "scale_factor": given.get("scale_factors"),
            "mode": mode,
            "align_corners": given.get("align_corners") or None,
            **options,
        }
        words = (f"{name}={plain(value)}" for name, value in written.items() if value is not None)
        return Text(f"F.interpolate({', '.join([given[arguments[0].name].code, *words])})")

    return write


INTERPOLATIONS: Mapping[Any, Spelling] = {
    **{getattr(aten, f"upsample_nearest{n}d").vec: _interpolated("nearest") for n in (1, 2, 3)},
    **{getattr(aten, f"_upsample_nearest_exact{n}d").vec: _interpolated("nearest-exact") for n in (1, 2, 3)},
    aten.upsample_linear1d.vec: _interpolated("linear"),
    aten.upsample_bilinear2d.vec: _interpolated("bilinear"),
    aten.upsample_trilinear3d.vec: _interpolated("trilinear"),
    aten.upsample_bicubic2d.vec: _interpolated("bicubic"),
    aten._upsample_bilinear2d_aa.vec: _interpolated("bilinear", antialias=True),
    aten._upsample_bicubic2d_aa.vec: _interpolated("bicubic", antialias=True),
}


def _index_put(use: Use) -> Text:
    """In public no dim can be left out, so that what leaves out one is the operator itself."""
    whole = any(index is None for index in use.args[1])
    written = ", ".join(plain(a) for a in use.args)
    return Text(f"torch.ops.{use.target}({written})" if whole else f"torch.index_put({written})")


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


def _in_training(position: int) -> Spelling:
    """A function of the runtime whose argument at ``position`` says that the model is in training."""

    def write(use: Use) -> Text:
        args = [Text("self.training") if i == position else a for i, a in enumerate(use.args)]
        return runtime(replace(use, args=tuple(args)))

    return write


def _batch_norm(use: Use) -> Text:
    """Without running statistics those of the batch normalize in evaluation too."""
    return runtime(use) if use.args[1] is None else _in_training(5)(use)


def _drawn(use: Use) -> Text:
    """Noise of a shape of its own, as a rank has it."""
    assert use.result is not None
    sizes = [use.local(use.result, dim) for dim in range(len(use.result.shape))]
    shape = f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
    return Text(f"{use.target.__name__}({shape}, {plain(use.args[1])}, dtype={use.result.dtype}, device={use.device})")


SPELLINGS: Mapping[Any, Spelling] = {
    aten.add.Tensor: infix("+", 12),
    aten.sub.Tensor: infix("-", 12, commutes=False),
    aten.mul.Tensor: infix("*", 13),
    aten.mul.Scalar: infix("*", 13),
    aten.div.Tensor: infix("/", 13, commutes=False),
    aten.div.Scalar: infix("/", 13, commutes=False),
    aten.matmul.default: infix("@", 13, commutes=False),
    aten.mm.default: infix("@", 13, commutes=False),
    aten.bmm.default: infix("@", 13, commutes=False),
    aten.bitwise_and.Tensor: infix("&", 10),
    aten.bitwise_or.Tensor: infix("|", 8),
    aten.eq.Scalar: infix("==", 7),
    aten.ne.Scalar: infix("!=", 7),
    aten.lt.Scalar: infix("<", 7),
    aten.le.Scalar: infix("<=", 7),
    aten.gt.Scalar: infix(">", 7),
    aten.ge.Scalar: infix(">=", 7),
    aten.eq.Tensor: infix("==", 7),
    aten.ne.Tensor: infix("!=", 7),
    aten.lt.Tensor: infix("<", 7),
    aten.le.Tensor: infix("<=", 7),
    aten.gt.Tensor: infix(">", 7),
    aten.ge.Tensor: infix(">=", 7),
    aten.neg.default: _negative,
    aten.bitwise_not.default: lambda use: Text(f"~{use.args[0].at(14)}", 14),
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.embedding.default: _embedding,
    aten.scaled_dot_product_attention.default: _attention,
    F.cross_entropy: _cross_entropy,
    F.embedding_bag: function("F.embedding_bag"),
    buffers.batch_norm: _batch_norm,
    buffers.store: _in_training(2),
    **dict.fromkeys(LOSSES, _loss),
    **INTERPOLATIONS,
    aten.index_put.default: _index_put,
    aten.im2col.default: lambda use: Text(f"F.unfold({', '.join(plain(a) for a in use.args)})"),
    aten.col2im.default: lambda use: Text(f"F.fold({', '.join(plain(a) for a in use.args)})"),
    random.dropout: _in_training(2),
    random.feature_dropout: _in_training(2),
    random.alpha_dropout: _in_training(2),
    random.feature_alpha_dropout: _in_training(2),
    random.attention_with_dropout: _in_training(4),
    random.rand: _drawn,
    random.randn: _drawn,
    aten.softmax.int: function("F.softmax", "dim", "dtype"),
    aten.log_softmax.int: function("F.log_softmax", "dim", "dtype"),
    aten.silu.default: function("F.silu"),
    aten.gelu.default: function("F.gelu"),
    aten.relu.default: function("F.relu"),
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.split.Tensor: _chunk,
    aten.split_with_sizes.default: method("split", "", "dim"),
    aten.pad.default: _pad,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.zeros.default: _filled("zeros"),
    aten.ones.default: _filled("ones"),
    aten.full.default: _filled("full"),
    aten.to.dtype: lambda use: Text(f"{use.args[0].at(20)}.to({use.args[1]})"),
    aten.transpose.int: method("transpose"),
    aten.unsqueeze.default: method("unsqueeze"),
    aten.squeeze.dim: method("squeeze"),
    aten.permute.default: _permute,
    aten.clone.default: method("clone"),
    aten.detach.default: method("detach"),
    aten.masked_fill.Scalar: _masked_fill,
    aten.pow.Tensor_Scalar: method("pow"),
    aten.mean.dim: lambda use: reduction("mean", use),
    aten.mean.default: method("mean"),
    aten.sum.dim_IntList: lambda use: reduction("sum", use),
    aten.sum.default: method("sum"),
    aten.logsumexp.default: lambda use: reduction("logsumexp", use),
    aten.cumsum.default: method("cumsum"),
    aten.gather.default: method("gather"),
    aten.cos.default: method("cos"),
    aten.sin.default: method("sin"),
    aten.tanh.default: function("torch.tanh"),
    aten.rsqrt.default: function("torch.rsqrt"),
}
