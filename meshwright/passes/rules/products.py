"""Products: of matrices, by an equation, of groups of rows, and what works on every matrix of a batch by itself."""

import torch

from meshwright.passes.factors import Factors, Rule, instantiate
from meshwright.passes.rules.call import Call, Rules, first_of, in_common
from meshwright.passes.rules.pointwise import along_whole

aten = torch.ops.aten


def _matmul(call: Call) -> Factors:
    left, right = call.operands
    assert left is not None and right is not None
    forms = {
        (1, 1): "k, k -> ",
        (2, 1): "m k, k -> m",
        (1, 2): "k, k n -> n",
    }
    text = forms.get((len(left.shape), len(right.shape)), "... m k, ... k n -> ... m n")
    if len(right.shape) == 2 and len(left.shape) > 2:
        text = "... k, k n -> ... n"
    rule = Rule(text, linear=((0,), (1,)))
    return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))


def _baddbmm(call: Call) -> Factors:
    """The first operand is added once: what is summed over stays whole."""
    rule = Rule("b m n, b m k!, b k! n -> b m n", linear=((0, 1), (0, 2)))
    return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))


def _einsum(call: Call) -> Factors:
    """The equation is the rule: "..." broadcasts from the right, a letter twice in a term is a diagonal and stays
    whole, and without an arrow the letters that occur once are the result's, in the order of the alphabet.
    """
    left, arrow, right = call.args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted({letter for letter in left if letter.isalpha() and left.count(letter) == 1})
        right = "..." * ("." in left) + "".join(letters)
    shapes = [value.shape for value in call.operands if value is not None]
    widths = [len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes, strict=True)]
    twice = {letter for term in terms for letter in term if letter.isalpha() and term.count(letter) > 1}

    def named(term: str, width: int) -> str:
        before, dots, after = term.partition("...")
        middle = [f"leading{n}" for n in range(width if dots else 0, 0, -1)]
        names = [f"x{ord(letter)}{'!' * (letter in twice)}" for letter in before + after]
        return " ".join([*names[: len(before)], *middle, *names[len(before) :]])

    operands = ", ".join(named(term, width) for term, width in zip(terms, widths, strict=True))
    rule = Rule(f"{operands} -> {named(right, max(widths))}", linear=tuple((i,) for i in range(len(terms))))
    return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))


def _grouped(call: Call) -> Factors:
    """Products of groups of rows (of tokens with their expert's matrix): the groups stay whole, features are split.

    Two matrices are grouped along what is summed over, which stays whole; three dims on both sides are a batch.
    """
    left, right, *_ = call.operands
    assert left is not None and right is not None
    texts = {
        (2, 3): "t! k, e! k n, e!? -> t! n",
        (3, 2): "e! m k, k n!, e!? -> m n!",
        (3, 3): "e m k, e k n -> e m n",
        (2, 2): "m k!, k! n, e!? -> e! m n",
    }
    text = texts[len(left.shape), len(right.shape)]
    if len(call.operands) < 3:
        text = "e m k, e k n -> e m n"
    elif (len(left.shape), len(right.shape)) == (2, 2):
        text = text.replace(", e!?", ", e!")
    rule = Rule(text, linear=((0,), (1,)))
    return instantiate(rule, call.shapes, tuple(value.shape for value in call.results))


def _matrices(call: Call) -> Factors:
    """Every matrix by itself, in the last two dims."""
    return in_common(call, range(len(first_of(call).shape) - 2))


_BY_MATRIX = (
    aten._linalg_det.default, aten._linalg_slogdet.default, aten._linalg_solve_ex.default, aten._linalg_eigh.default,
    aten._linalg_svd.default, aten.linalg_cholesky_ex.default, aten.linalg_inv_ex.default,
    aten.linalg_matrix_exp.default, aten.linalg_qr.default, aten.linalg_solve_triangular.default,
)  # fmt: skip

PRODUCTS: Rules = {
    aten.linear.default: Rule("... i, o i -> ... o", linear=((0,), (1,))),
    aten.bilinear.default: Rule("... i!, ... j!, o i! j!, o -> ... o"),
    aten.matmul.default: _matmul,
    aten.mm.default: Rule("m k, k n -> m n", linear=((0,), (1,))),
    aten.bmm.default: Rule("b m k, b k n -> b m n", linear=((0,), (1,))),
    aten.mv.default: Rule("m k, k -> m", linear=((0,), (1,))),
    aten.dot.default: Rule("k, k ->", linear=((0,), (1,))),
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
    aten._grouped_mm.default: _grouped,
    aten.cdist.default: Rule("... p d!, ... r d! -> ... p r"),
    aten.linalg_cross.default: along_whole(2),
    **dict.fromkeys(_BY_MATRIX, _matrices),
}
