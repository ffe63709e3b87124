"""Calls of every operator that has a rule, to prove it on."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from meshwright.runtime import batch_norm

aten = torch.ops.aten


def x(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def ids(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


WHOLE = (
    aten.max.default, aten.min.default, aten.all.default, aten.any.default, aten.prod.default, aten.median.default,
    aten.nanmedian.default,
)  # fmt: skip
"""Of these a rule promises nothing but that they are known: they take everything whole."""

FIXED = {
    F.cross_entropy: (2,),
    aten.fractional_max_pool2d.default: (1,),
    aten.fractional_max_pool3d.default: (1,),
    aten.scatter.reduce: (0, 1, 2),
    aten.scatter.value_reduce: (0, 1),
    aten.multi_margin_loss.default: (2,),
    aten.histc.default: (0,),
    aten.batch_norm.default: (3, 4),
    batch_norm: (1, 2),
    aten.soft_margin_loss.default: (1,),
    aten.binary_cross_entropy.default: (1, 2),
    aten.binary_cross_entropy_with_logits.default: (1, 2),
}
"""Operands that torch has no gradient for."""

CASES: dict[Any, list[Callable[[], tuple[list[Any], dict[str, Any]]]]] = {
    aten.to.dtype: [lambda: ([x(4, 6), torch.float64], {})],
    aten.linear.default: [lambda: ([x(2, 4, 6), x(8, 6)], {}), lambda: ([x(4, 6), x(8, 6)], {})],
    aten.matmul.default: [
        lambda: ([x(2, 4, 6), x(6, 8)], {}),
        lambda: ([x(2, 4, 6), x(2, 6, 8)], {}),
        lambda: ([x(6), x(6, 4)], {}),
        lambda: ([x(4, 6), x(6)], {}),
    ],
    aten.mm.default: [lambda: ([x(4, 6), x(6, 8)], {})],
    aten.bmm.default: [lambda: ([x(2, 4, 6), x(2, 6, 8)], {})],
    aten.embedding.default: [lambda: ([x(10, 6), ids(10, 4, 6)], {}), lambda: ([x(10, 6), ids(10, 4, 6), 3], {})],
    aten.layer_norm.default: [lambda: ([x(4, 6, 8), [8], x(8), x(8)], {}), lambda: ([x(4, 6, 8), [6, 8]], {})],
    aten.rms_norm.default: [lambda: ([x(4, 6, 8), [8], x(8)], {})],
    aten.softmax.int: [lambda: ([x(4, 6, 8), -1], {}), lambda: ([x(4, 6, 8), 1], {})],
    aten.log_softmax.int: [lambda: ([x(4, 6, 8), -1], {})],
    aten.scaled_dot_product_attention.default: [
        lambda: ([x(2, 4, 6, 8), x(2, 4, 6, 8), x(2, 4, 6, 8)], {"is_causal": True}),
        lambda: ([x(2, 4, 6, 8), x(2, 2, 6, 8), x(2, 2, 6, 8)], {"is_causal": True, "enable_gqa": True}),
        lambda: ([x(2, 4, 6, 8), x(2, 4, 6, 8), x(2, 4, 6, 8), x(2, 1, 6, 6)], {}),
        lambda: ([x(2, 4, 6, 8), x(2, 4, 6, 8), x(2, 4, 6, 8), x(6, 6)], {"scale": 0.3}),
    ],
    F.cross_entropy: [
        lambda: ([x(8, 10), ids(10, 8)], {"reduction": "sum"}),
        lambda: ([x(8, 10), ids(10, 8), x(10).abs()], {"reduction": "sum", "label_smoothing": 0.1}),
        lambda: ([x(8, 10), x(8, 10).softmax(-1)], {"reduction": "sum"}),
        lambda: ([x(8, 10), x(8, 10).softmax(-1), x(10).abs()], {"reduction": "sum", "label_smoothing": 0.1}),
    ],
    aten.sum.default: [lambda: ([x(4, 6)], {})],
    aten.sum.dim_IntList: [lambda: ([x(4, 6, 8), [1]], {}), lambda: ([x(4, 6, 8), [0, -1], True], {})],
    aten.mean.default: [lambda: ([x(4, 6)], {})],
    aten.mean.dim: [lambda: ([x(4, 6, 8), [-1], True], {})],
    aten.amax.default: [lambda: ([x(4, 6, 8), [1]], {})],
    aten.cumsum.default: [lambda: ([x(4, 6), 1], {})],
    aten.view.default: [
        lambda: ([x(4, 6, 8), [24, 8]], {}),
        lambda: ([x(4, 12), [4, 2, 6]], {}),
        lambda: ([x(4, 12), [4, 6, 2]], {}),
    ],
    aten.reshape.default: [lambda: ([x(4, 6, 8), [4, 48]], {})],
    aten.flatten.using_ints: [lambda: ([x(4, 6, 8), 1, 2], {})],
    aten.unflatten.int: [lambda: ([x(4, 12), 1, [-1, 3]], {})],
    aten.unsqueeze.default: [lambda: ([x(4, 6), 1], {})],
    aten.squeeze.dim: [lambda: ([x(4, 1, 6), 1], {})],
    aten.squeeze.default: [lambda: ([x(4, 1, 6)], {})],
    aten.expand.default: [lambda: ([x(4, 1, 6), [4, 2, 6]], {})],
    aten.transpose.int: [lambda: ([x(4, 6, 8), 1, 2], {})],
    aten.permute.default: [lambda: ([x(4, 6, 8), [2, 0, 1]], {})],
    aten.slice.Tensor: [lambda: ([x(4, 6), 1, 2, 5], {})],
    aten.select.int: [lambda: ([x(4, 6), 1, 2], {})],
    aten.split.Tensor: [
        lambda: ([x(4, 12), 6, 1], {}),
        lambda: ([x(4, 12), 4, 1], {}),
        lambda: ([x(4, 10), 4, 1], {}),
    ],
    aten.chunk.default: [lambda: ([x(4, 12), 3, 1], {}), lambda: ([x(4, 8), 3, 1], {})],
    aten.cat.default: [lambda: ([[x(4, 6), x(4, 6)], 1], {}), lambda: ([[x(4, 6), x(2, 6)], 0], {})],
    aten.pad.default: [lambda: ([x(4, 6), [0, 2]], {}), lambda: ([x(4, 6), [1, 0], "constant", 3.0], {})],
    aten.where.Scalar: [lambda: ([x(4, 6) > 0, 1.0, 2.0], {})],
    aten.where.ScalarSelf: [lambda: ([x(4, 6) > 0, 1.0, x(4, 6)], {})],
    aten.where.ScalarOther: [lambda: ([x(4, 6) > 0, x(4, 6), 2.0], {})],
    aten.floor_divide.default: [lambda: ([ids(9, 4, 6), ids(3, 6) + 1], {})],
    aten.floor_divide.Scalar: [lambda: ([ids(9, 4, 6), 2], {})],
    aten.real.default: [lambda: ([torch.complex(x(4, 6), x(4, 6))], {})],
    aten.imag.default: [lambda: ([torch.complex(x(4, 6), x(4, 6))], {})],
    aten.conj.default: [lambda: ([torch.complex(x(4, 6), x(4, 6))], {})],
    aten.mv.default: [lambda: ([x(4, 6), x(6)], {})],
    aten.dot.default: [lambda: ([x(6), x(6) + 1], {})],
    aten.baddbmm.default: [
        lambda: ([x(2, 4, 8), x(2, 4, 6), x(2, 6, 8)], {"beta": 0.5}),
        lambda: ([x(2, 1, 8), x(2, 4, 6), x(2, 6, 8)], {}),
    ],
    aten.einsum.default: [
        lambda: (["bhqd,bhkd->bhqk", [x(2, 4, 6, 8), x(2, 4, 2, 8)]], {}),
        lambda: (["ij, jk -> ik", [x(4, 6), x(6, 8)]], {}),
    ],
    aten.conv1d.default: [
        lambda: ([x(2, 4, 9), x(6, 4, 3), x(6), [2], [1]], {}),
        lambda: ([x(2, 4, 9), x(6, 4, 3)], {}),
        lambda: ([x(2, 4, 9), x(4, 1, 3), x(4), [1], [2], [1], 4], {}),
    ],
    aten.conv2d.default: [
        lambda: ([x(2, 4, 5, 6), x(6, 4, 2, 3), x(6)], {}),
        lambda: ([x(2, 4, 5, 6), x(6, 4, 2, 3)], {}),
    ],
    aten.conv3d.default: [lambda: ([x(2, 4, 3, 5, 4), x(6, 4, 2, 3, 2)], {})],
    aten.conv_transpose1d.default: [
        lambda: ([x(2, 4, 9), x(4, 6, 3), x(6)], {}),
        lambda: ([x(2, 4, 9), x(4, 6, 3)], {}),
    ],
    aten.conv_transpose2d.input: [lambda: ([x(2, 4, 5, 6), x(4, 6, 2, 3), None, [2, 1]], {})],
    aten.conv_transpose3d.input: [lambda: ([x(2, 4, 3, 2, 3), x(4, 6, 2, 3, 2)], {})],
    aten.avg_pool1d.default: [lambda: ([x(2, 4, 8), [2]], {})],
    aten.avg_pool2d.default: [lambda: ([x(2, 4, 8, 6), [2, 3]], {})],
    aten.avg_pool3d.default: [lambda: ([x(2, 4, 4, 6, 4), [2, 3, 2]], {})],
    aten.max_pool1d.default: [lambda: ([x(2, 4, 8), [2]], {})],
    aten.max_pool2d.default: [lambda: ([x(2, 4, 8, 6), [2, 3]], {})],
    aten.max_pool3d.default: [lambda: ([x(2, 4, 4, 6, 4), [2, 3, 2]], {})],
    aten.adaptive_avg_pool1d.default: [lambda: ([x(2, 4, 8), [1]], {})],
    aten.adaptive_avg_pool2d.default: [lambda: ([x(2, 4, 8, 6), [2, 1]], {})],
    aten.adaptive_avg_pool3d.default: [lambda: ([x(2, 4, 4, 6, 4), [2, 1, 1]], {})],
    aten.group_norm.default: [lambda: ([x(4, 6, 5), 3, x(6), x(6)], {})],
    aten.instance_norm.default: [lambda: ([x(4, 6, 5), x(6), x(6), None, None, True, 0.1, 1e-5, False], {})],
    aten.batch_norm.default: [
        lambda: ([x(4, 6, 5), x(6), x(6), None, None, True, 0.1, 1e-5, False], {}),
        lambda: ([x(4, 6), x(6), x(6), x(6), x(6).abs(), False, 0.1, 1e-5, False], {}),
    ],
    batch_norm: [
        lambda: ([x(4, 6, 5), x(6), x(6).abs(), x(6), x(6), True], {"momentum": 0.1, "eps": 1e-5}),
        lambda: ([x(4, 6, 5), None, None, x(6), None, True], {"eps": 1e-5}),
    ],
    aten._weight_norm_interface.default: [
        lambda: ([x(4, 6, 8), x(1, 1, 8), 2], {}),
        lambda: ([x(4, 6), x(4, 1)], {}),
    ],
    aten.gather.default: [lambda: ([x(4, 6), 1, ids(6, 4, 2)], {}), lambda: ([x(8, 6), 0, ids(8, 4, 6)], {})],
    aten.scatter.src: [lambda: ([x(4, 6), 1, ids(6, 4, 1), x(4, 1)], {})],
    aten.scatter.value: [lambda: ([x(4, 6), 1, ids(6, 4, 2), 3.0], {})],
    aten.scatter_add.default: [lambda: ([x(4, 6), 1, ids(6, 4, 2), x(4, 2)], {})],
    aten.index_select.default: [lambda: ([x(4, 6, 2), 1, ids(6, 4)], {})],
    aten.index.Tensor: [
        lambda: ([x(4, 6, 8), [None, ids(6, 2)]], {}),
        lambda: ([x(4, 6, 8), [ids(4, 2, 1), ids(6, 4)]], {}),
        lambda: ([x(4, 6, 8), [ids(4, 2), None, ids(8, 2)]], {}),
    ],
    aten.one_hot.default: [lambda: ([ids(5, 4, 6), 5], {})],
    aten.mse_loss.default: [
        lambda: ([x(4, 6), x(4, 6) + 1, 0], {}),
        lambda: ([x(4, 6), x(4, 6) + 1, 1], {}),
        lambda: ([x(4, 6), x(4, 6) + 1, 2], {}),
    ],
    aten.l1_loss.default: [lambda: ([x(4, 6), x(4, 6) + 1], {})],
    aten.smooth_l1_loss.default: [lambda: ([x(4, 6), x(4, 6) + 1], {})],
    aten.huber_loss.default: [lambda: ([x(4, 6), x(4, 6) + 1, 2], {})],
    aten.soft_margin_loss.default: [lambda: ([x(4, 6), x(4, 6).sign()], {})],
    aten.binary_cross_entropy.default: [lambda: ([x(4, 6).sigmoid(), x(4, 6).sigmoid(), x(6).abs()], {})],
    aten.binary_cross_entropy_with_logits.default: [
        lambda: ([x(4, 6), x(4, 6).sigmoid(), None, x(6).abs()], {}),
        lambda: ([x(4, 6), x(4, 6).sigmoid()], {}),
    ],
    aten.kl_div.default: [lambda: ([x(4, 6), x(4, 6).softmax(-1), 2], {})],
    **{op: [lambda: ([x(4, 6)], {})] for op in WHOLE},
    aten.amin.default: [lambda: ([x(4, 6, 8), [1]], {})],
    **{
        op: [lambda: ([x(4, 6, 8), 1], {})]
        for op in (
            aten.all.dim,
            aten.any.dim,
            aten.prod.dim_int,
            aten.argmax.default,
            aten.argmin.default,
            aten.max.dim,
            aten.min.dim,
            aten.cumprod.default,
            aten.logcumsumexp.default,
            aten.cummax.default,
            aten.cummin.default,
            aten.sort.default,
            aten.argsort.default,
        )
    },
    **{op: [lambda: ([x(4, 6, 8), [1]], {})] for op in (aten.logsumexp.default, aten.var.dim, aten.std.dim)},
    **{
        op: [lambda: ([x(4, 6, 8), [1]], {"correction": 1, "keepdim": True})]
        for op in (aten.var.correction, aten.std.correction)
    },
    aten.linalg_vector_norm.default: [lambda: ([x(4, 6, 8), 2, [-1], True], {}), lambda: ([x(4, 6)], {})],
    aten.norm.ScalarOpt_dim: [lambda: ([x(4, 6, 8), 2.0, [1]], {})],
    aten.topk.default: [lambda: ([x(4, 6, 8), 3, 1], {}), lambda: ([x(4, 6), 3], {})],
    **{op: [lambda: ([x(4, 6)], {})] for op in (aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default)},
    **{
        op: [lambda: ([x(4, 6), 5, 0], {})]
        for op in (aten.fft_irfft.default, aten.fft_hfft.default, aten.fft_ihfft.default)
    },
    aten.split_with_sizes.default: [lambda: ([x(4, 12), [4, 8], 1], {})],
    aten.stack.default: [lambda: ([[x(4, 6), x(4, 6)], 1], {}), lambda: ([[x(4, 6), x(4, 6)], -1], {})],
    aten.roll.default: [lambda: ([x(4, 6, 8), [2], [1]], {})],
    aten.flip.default: [lambda: ([x(4, 6, 8), [1]], {})],
    aten.tril.default: [lambda: ([x(4, 6, 6)], {})],
    aten.triu.default: [lambda: ([x(4, 6, 6), 1], {})],
    aten.slice_scatter.default: [lambda: ([x(4, 6), x(4, 3), 1, 2, 5], {})],
    aten.select_scatter.default: [lambda: ([x(4, 6, 8), x(4, 8), 1, 2], {}), lambda: ([x(4, 6), x(6), 0, 1], {})],
    aten.view_as_complex.default: [lambda: ([x(4, 6, 2)], {})],
    aten.view_as_real.default: [lambda: ([torch.complex(x(4, 6), x(4, 6))], {})],
    aten.full_like.default: [lambda: ([x(4, 6), 3.0], {})],
    aten.detach.default: [lambda: ([x(4, 6)], {})],
    aten.zeros_like.default: [lambda: ([x(4, 6)], {})],
    aten.ones_like.default: [lambda: ([x(4, 6)], {})],
}

_LENGTHS = torch.tensor([8, 7, 8, 6])
_OFFSETS = torch.tensor([8, 20, 32], dtype=torch.int32)


def _positive(*shape: int) -> torch.Tensor:
    """Matrices with an inverse and a root."""
    a = x(*shape)
    return a @ a.mT + 5 * torch.eye(shape[-1], dtype=a.dtype)


def _whole_numbers(*shape: int) -> torch.Tensor:
    """For products that have no kernel in float64: sums of these are exact in float32."""
    return (2 * x(*shape)).round().float()


def _recurrent(gates: int, *states: torch.Tensor, batch_first: bool = False) -> tuple[list[Any], dict[str, Any]]:
    weights = [x(gates * 6, 8), x(gates * 6, 6), x(gates * 6), x(gates * 6)]
    inputs = x(4, 5, 8) if batch_first else x(5, 4, 8)
    hidden: Any = list(states) if len(states) > 1 else states[0]
    return [inputs, hidden, weights, True, 1, 0.0, True, False, batch_first], {}


CASES |= {
    # products
    aten.bilinear.default: [
        lambda: ([x(4, 6), x(4, 8), x(2, 6, 8), x(2)], {}),
        lambda: ([x(4, 6), x(4, 8), x(2, 6, 8)], {}),
    ],
    aten._grouped_mm.default: [
        lambda: ([_whole_numbers(32, 48), _whole_numbers(3, 48, 24)], {"offs": _OFFSETS}),
        lambda: ([_whole_numbers(3, 4, 48), _whole_numbers(48, 32)], {"offs": _OFFSETS}),
        lambda: ([_whole_numbers(3, 4, 48), _whole_numbers(3, 48, 24)], {}),
        lambda: ([_whole_numbers(24, 32), _whole_numbers(32, 24)], {"offs": _OFFSETS}),
    ],
    aten.cdist.default: [lambda: ([x(2, 4, 6), x(2, 8, 6) + 1], {}), lambda: ([x(2, 4, 6), x(8, 6) + 1], {})],
    aten.linalg_cross.default: [
        lambda: ([x(4, 6, 3), x(1, 6, 3) + 1], {}),
        lambda: ([x(4, 3), x(4, 3) + 1], {"dim": 1}),
    ],
    aten._linalg_det.default: [lambda: ([_positive(4, 3, 3)], {})],
    aten._linalg_slogdet.default: [lambda: ([_positive(4, 3, 3)], {})],
    aten._linalg_solve_ex.default: [lambda: ([_positive(4, 3, 3), x(4, 3, 2)], {})],
    aten._linalg_eigh.default: [lambda: ([_positive(4, 3, 3)], {})],
    aten._linalg_svd.default: [lambda: ([_positive(4, 3, 3) + torch.arange(3.0).double().diag()], {})],
    aten.linalg_cholesky_ex.default: [lambda: ([_positive(4, 3, 3)], {})],
    aten.linalg_inv_ex.default: [lambda: ([_positive(4, 3, 3)], {})],
    aten.linalg_matrix_exp.default: [lambda: ([x(4, 3, 3)], {})],
    aten.linalg_qr.default: [lambda: ([_positive(4, 3, 3)], {})],
    aten.linalg_solve_triangular.default: [lambda: ([_positive(4, 3, 3), x(4, 3, 2)], {"upper": True})],
    # images
    **{
        getattr(aten, f"conv{n}d").padding: [
            lambda n=n: ([x(2, 4, *[5] * n), x(6, 4, *[3] * n), None, [1] * n, "same"], {})  # type: ignore[misc]
        ]
        for n in (1, 2, 3)
    },
    aten.convolution.default: [
        lambda: ([x(2, 4, 9), x(6, 4, 3), x(6), [1], [1], [1], False, [0], 1], {}),
        lambda: ([x(2, 4, 9), x(4, 6, 3), None, [1], [1], [1], True, [0], 1], {}),
    ],
    **{
        getattr(aten, f"max_pool{n}d_with_indices").default: [lambda n=n: ([x(2, 4, *[4] * n), [2] * n], {})]  # type: ignore[misc]
        for n in (1, 2, 3)
    },
    **{
        getattr(aten, f"adaptive_max_pool{n}d").default: [lambda n=n: ([x(2, 4, *[4] * n), [2] * n], {})]  # type: ignore[misc]
        for n in (1, 2, 3)
    },
    aten.max_unpool2d.default: [
        lambda: ([x(2, 4, 2, 2), torch.arange(4).view(2, 2).expand(2, 4, 2, 2) * 5, [4, 4]], {})
    ],
    aten.max_unpool3d.default: [
        lambda: (
            [
                x(2, 4, 2, 2, 2),
                torch.arange(8).view(2, 2, 2).expand(2, 4, 2, 2, 2) * 9,
                [4, 4, 4],
                [2, 2, 2],
                [0, 0, 0],
            ],
            {},
        )
    ],
    **{
        getattr(aten, f"fractional_max_pool{n}d").default: [
            lambda n=n: ([x(2, 4, *[6] * n), [2] * n, [3] * n, x(2, 4, n).sigmoid()], {})  # type: ignore[misc]
        ]
        for n in (2, 3)
    },
    **{
        getattr(aten, f"{name}{n}d").vec: [lambda n=n, rest=rest: ([x(2, 4, *[4] * n), [6] * n, *rest, None], {})]  # type: ignore[misc]
        for name, dims, rest in (
            ("upsample_nearest", (1, 2, 3), []),
            ("_upsample_nearest_exact", (1, 2, 3), []),
            ("upsample_linear", (1,), [False]),
            ("upsample_bilinear", (2,), [True]),
            ("upsample_trilinear", (3,), [False]),
            ("upsample_bicubic", (2,), [False]),
        )
        for n in dims
    },
    aten._upsample_bilinear2d_aa.vec: [lambda: ([x(2, 4, 8, 8), [5, 3], False, None], {})],
    aten._upsample_bicubic2d_aa.vec: [lambda: ([x(2, 4, 8, 8), [5, 3], False, None], {})],
    aten.grid_sampler.default: [lambda: ([x(2, 4, 5, 6), x(2, 2, 4, 2).tanh(), 0, 0, False], {})],
    aten.im2col.default: [lambda: ([x(2, 4, 5, 6), [2, 3], [1, 1], [0, 1], [1, 1]], {})],
    aten.col2im.default: [lambda: ([x(2, 16, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]], {})],
    aten.pixel_shuffle.default: [lambda: ([x(2, 8, 3, 2), 2], {})],
    aten.pixel_unshuffle.default: [lambda: ([x(2, 4, 6, 4), 2], {})],
    aten.channel_shuffle.default: [lambda: ([x(2, 8, 3, 2), 2], {})],
    # recurrent layers
    aten.lstm.input: [
        lambda: _recurrent(4, x(1, 4, 6), x(1, 4, 6) + 1),
        lambda: _recurrent(4, x(1, 4, 6), x(1, 4, 6) + 1, batch_first=True),
    ],
    aten.gru.input: [lambda: _recurrent(3, x(1, 4, 6)), lambda: _recurrent(3, x(1, 4, 6), batch_first=True)],
    aten.rnn_tanh.input: [lambda: _recurrent(1, x(1, 4, 6))],
    aten.rnn_relu.input: [lambda: _recurrent(1, x(1, 4, 6))],
    # reductions
    aten.histc.default: [lambda: ([x(4, 6), 5, -1, 1], {})],
    aten.nansum.default: [lambda: ([x(4, 6, 8), [1]], {}), lambda: ([x(4, 6)], {})],
    aten.count_nonzero.default: [lambda: ([ids(3, 4, 6)], {}), lambda: ([ids(3, 4, 6), 1], {})],
    aten.count_nonzero.dim_IntList: [lambda: ([ids(3, 4, 6), [1]], {})],
    **{
        op: [lambda: ([x(4, 6, 8), [1]], {"correction": 1})]
        for op in (aten.var_mean.correction, aten.std_mean.correction)
    },
    **{op: [lambda: ([x(4, 6)], {})] for op in (aten.median.default, aten.nanmedian.default)},
    aten.glu.default: [lambda: ([x(4, 6, 8)], {}), lambda: ([x(4, 8, 6), 1], {})],
    aten.sort.stable: [lambda: ([x(4, 6, 8)], {"stable": True, "dim": 1})],
    aten.argsort.stable: [lambda: ([x(4, 6, 8)], {"stable": True, "dim": 1})],
    aten.kthvalue.default: [lambda: ([x(4, 6, 8), 3, 1], {}), lambda: ([x(4, 6), 2, 0, True], {})],
    **{op: [lambda: ([x(4, 6, 8), 1], {})] for op in (aten.median.dim, aten.nanmedian.dim)},
    aten.mode.default: [lambda: ([ids(3, 4, 6).double(), 1], {})],
    aten.aminmax.default: [lambda: ([x(4, 6, 8)], {"dim": 1}), lambda: ([x(4, 6)], {})],
    aten.renorm.default: [lambda: ([x(4, 6, 8), 2, 1, 0.5], {})],
    # element by element
    aten.rsub.Tensor: [lambda: ([x(4, 6), x(6)], {"alpha": 2})],
    aten.hardswish.default: [lambda: ([x(4, 6)], {})],
    aten.log_sigmoid.default: [lambda: ([x(4, 6)], {})],
    aten._prelu_kernel.default: [lambda: ([x(4, 6, 8), x(6, 1)], {})],
    aten.masked_fill.Tensor: [lambda: ([x(4, 6), x(4, 6) > 0, torch.tensor(0.5).double()], {})],
    aten.complex.default: [lambda: ([x(4, 6), x(4, 6) + 1], {})],
    aten.polar.default: [lambda: ([x(4, 6).abs(), x(4, 6)], {})],
    **{
        getattr(aten, f"fft_{name}2").default: [lambda: ([x(4, 6, 8)], {})] for name in ("fft", "ifft", "rfft", "irfft")
    },
    **{
        getattr(aten, f"fft_{name}n").default: [
            lambda: ([x(4, 6, 8), None, [1, 2]], {}),
            lambda: ([x(4, 6, 8), [4], [1]], {}),
        ]
        for name in ("fft", "ifft", "rfft", "irfft")
    },
    # indexing
    aten.scatter.reduce: [lambda: ([x(4, 6), 1, ids(6, 4, 1), x(4, 1)], {"reduce": "add"})],
    aten.scatter.value_reduce: [lambda: ([x(4, 6), 1, ids(6, 4, 2), 3.0], {"reduce": "multiply"})],
    aten.scatter_reduce.two: [
        lambda r=r: ([x(4, 6), 1, ids(6, 4, 2), x(4, 2), r], {})  # type: ignore[misc]
        for r in ("sum", "prod", "mean", "amax")
    ],
    aten.index_add.default: [
        lambda: ([x(4, 6, 8), 1, ids(6, 3), x(4, 3, 8)], {"alpha": 2}),
        lambda: ([x(6, 4), 0, ids(6, 3), x(3, 4)], {}),
    ],
    aten.index_copy.default: [lambda: ([x(4, 6, 8), 1, torch.tensor([0, 3, 2]), x(4, 3, 8)], {})],
    aten.index_fill.int_Scalar: [lambda: ([x(4, 6), 1, ids(6, 3), 2.0], {})],
    aten.index_reduce.default: [lambda: ([x(4, 6), 1, torch.tensor([0, 3, 2]), x(4, 3), "prod"], {})],
    aten.index_put.default: [
        lambda: ([x(4, 6, 8), [None, torch.tensor([0, 3, 2])], x(4, 3, 8)], {}),
        lambda: ([x(4, 6, 8), [torch.tensor([0, 3]), torch.tensor([1, 1])], x(8)], {}),
        lambda: ([x(4, 6, 8), [ids(4, 2, 1), None, ids(8, 2)], x(2, 2, 6), True], {}),
        lambda: ([x(4, 6, 8), [ids(2, 4, 6) > 0], x(8)], {}),
    ],
    aten.take.default: [lambda: ([x(4, 6), ids(24, 2, 8)], {})],
    aten.bucketize.Tensor: [lambda: ([x(4, 6), torch.tensor([-0.5, 0.5]).double()], {})],
    aten.searchsorted.Tensor: [
        lambda: ([torch.tensor([-0.5, 0.5]).double(), x(4, 6)], {}),
        lambda: ([x(4, 8).sort(-1).values, x(4, 6)], {}),
    ],
    aten.isin.Tensor_Tensor: [lambda: ([ids(9, 4, 6), ids(9, 3)], {})],
    F.embedding_bag: [
        lambda: ([ids(10, 12), x(10, 6), torch.tensor([0, 5, 7])], {"mode": "mean"}),
        lambda: ([ids(10, 12), x(10, 6), torch.tensor([0, 5, 7])], {"mode": "sum", "per_sample_weights": x(12)}),
    ],
    # losses
    aten.multi_margin_loss.default: [
        lambda: ([x(4, 6), ids(6, 4)], {}),
        lambda: ([x(4, 6), ids(6, 4), 1, 1, x(6).abs(), 2], {}),
        lambda: ([x(4, 6), ids(6, 4), 1, 1, None, 0], {}),
    ],
    aten.multilabel_margin_loss.default: [lambda r=r: ([x(4, 6), ids(6, 4, 6) - 1, r], {}) for r in (0, 1, 2)],  # type: ignore[misc]
    aten.ctc_loss.Tensor: [
        lambda r=r: ([x(8, 4, 6).log_softmax(-1), ids(5, 4, 3) + 1, _LENGTHS, torch.tensor([3, 1, 2, 3]), 0, r], {})  # type: ignore[misc]
        for r in (0, 1, 2)
    ],
    # cuts
    aten.unbind.int: [lambda: ([x(4, 6, 8), 1], {}), lambda: ([x(4, 6), 0], {})],
    aten.repeat_interleave.self_int: [lambda: ([x(4, 6, 8), 3, 1], {})],
    aten.repeat_interleave.self_Tensor: [lambda: ([x(4, 6, 8), torch.tensor([1, 0, 2, 1, 1, 3]), 1], {})],
    aten.unfold.default: [lambda: ([x(4, 6, 8), 1, 3, 2], {})],
    aten.diagonal.default: [lambda: ([x(4, 6, 6, 8), 1, 1, 2], {}), lambda: ([x(6, 6, 4)], {})],
    aten.diag_embed.default: [lambda: ([x(4, 6)], {}), lambda: ([x(4, 6, 8), 1, 0, 2], {})],
    aten.diagonal_scatter.default: [lambda: ([x(4, 6, 6, 8), x(4, 8, 5), 1, 1, 2], {})],
    aten.rot90.default: [lambda: ([x(4, 6, 8), 1, [1, 2]], {})],
    aten.squeeze.dims: [lambda: ([x(4, 1, 6, 1), [1, 3]], {})],
}
CASES[aten.einsum.default] += [
    lambda: (["...j,jk->...k", [x(2, 4, 6), x(6, 8)]], {}),
    lambda: (["b...ij,b...jk->b...ik", [x(2, 3, 4, 6), x(2, 3, 6, 8)]], {}),
    lambda: (["b...i,...i", [x(2, 4, 6), x(1, 6)]], {}),
    lambda: (["bii->bi", [x(4, 6, 6)]], {}),
    lambda: (["bii,bJ", [x(4, 6, 6), x(4, 8)]], {}),
]
CASES[aten.conv1d.default] += [
    lambda: ([x(2, 8, 9), x(12, 4, 3), x(12), [1], [1], [1], 2], {}),
    lambda: ([x(2, 8, 9), x(12, 4, 3), None, [1], [1], [1], 2], {}),
]
CASES[aten.conv_transpose1d.default] += [
    lambda: ([x(2, 8, 9), x(8, 6, 3), x(12), [2], [1], [0], 2], {}),
    lambda: ([x(2, 8, 9), x(8, 6, 3), None, [2], [1], [0], 2], {}),
]
CASES[aten.instance_norm.default] += [
    lambda: ([x(4, 6, 5), None, None, None, None, True, 0.1, 1e-5, False], {}),
]
