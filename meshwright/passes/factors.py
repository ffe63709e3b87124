"""What an operator does to the dimensions of its operands, as factors; and the notation that rules are written in.

A factor is a run of indices that operands and results share: where one tensor is split along it, all are. In a rule
each
letter is a factor::

    ... i, o i -> ... o       "..." stands for leading dims; i is missing in the result, so it is summed over
    ... d!, d!? -> ... d!     "!" must stay whole; "?" the operand may be absent

A factor can be a part of a dim, as after a reshape: ``outer`` is then the product of the sizes before it in that dim,
and
splitting the factor is the type ``S(dim/outer)``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from meshwright.compiler.errors import PlanError
from meshwright.compiler.types import S, Size, Type

Shape = tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a factor stands in a tensor: in ``dim``, behind factors whose sizes multiply to ``outer``."""

    dim: int
    outer: Size = 1

    def split(self, groups: Size = 1) -> Type:
        return S(self.dim, self.outer * groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One factor with its places in every operand and every result (None: it is not there).

    whole: it must not be split. equal: its pieces must be equally long. mean: it is averaged over, not summed.
    pieces: computing with a piece of it takes lines of its own, by this name (see ``meshwright.passes.pieces``).
    invariant: those lines end with the whole result. synchronized: the operator computes with a piece if it is told the
    axis (``over=``), for it takes statistics of all.
    """

    size: Size
    operands: tuple[Place | None, ...]
    results: tuple[Place | None, ...]
    whole: bool = False
    equal: bool = False
    mean: bool = False
    pieces: str | None = None
    invariant: bool = False
    synchronized: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """All factors of one call. ``linear``: sets of operands (by position) that a call is linear in together."""

    factors: tuple[Factor, ...]
    linear: tuple[frozenset[int], ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as text. Raises PlanError when the text cannot be read.

    linear: the operands that partial values may pass through, each entry a set of positions taken together:
        ``((0,), (1,))`` for a product, ``((0, 1),)`` for a sum.
    pieces: letters that may be split although the operator alone cannot compute with a piece, and the name of the lines
        that can. invariant: those of them whose lines end with the whole result.
    """

    text: str
    linear: tuple[tuple[int, ...], ...] = ()
    pieces: Mapping[str, str] = field(default_factory=dict)
    invariant: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        operands, results = parse(self.text)
        for positions in self.linear:
            if any(position >= len(operands) for position in positions):
                raise PlanError(f"rule {self.text!r} has {len(operands)} operands, linear={self.linear} names more")
        letters = {letter.name for operand in (*operands, *results) for letter in operand.letters}
        if unknown := (set(self.pieces) | self.invariant) - letters:
            raise PlanError(f"rule {self.text!r} has no factor {', '.join(sorted(unknown))}")


@dataclass(frozen=True, slots=True)
class Letter:
    name: str
    whole: bool


@dataclass(frozen=True, slots=True)
class Operand:
    """The letters of one operand; ``leading`` is the position of ``...`` or None."""

    letters: tuple[Letter, ...]
    leading: bool
    optional: bool


_TERM = re.compile(r"^([a-z]\w*)(!?)(\??)$")


def parse(text: str) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    """The operands and results of a rule's text. Raises PlanError that shows the place."""
    sides = text.split("->")
    if len(sides) != 2:
        raise PlanError(f"rule {text!r}: one '->' stands between operands and results")
    operands, results = (tuple(_operand(text, part) for part in side.split(",")) for side in sides)
    known = {letter.name for operand in operands for letter in operand.letters}
    for result in results:
        for letter in result.letters:
            if letter.name not in known:
                raise PlanError(f"rule {text!r}: {letter.name!r} stands in a result and in no operand")
    return operands, results


def _operand(text: str, part: str) -> Operand:
    letters, leading, optional = [], False, False
    for position, term in enumerate(part.split()):
        if term == "...":
            if position:
                raise PlanError(f"rule {text!r}: '...' stands first in {part.strip()!r}")
            leading = True
            continue
        match = _TERM.match(term)
        if match is None:
            raise PlanError(
                f"rule {text!r}: {term!r} is no factor: a name, then '!' if whole, '?' if the operand may be absent"
            )
        letters.append(Letter(match[1], bool(match[2])))
        optional |= bool(match[3])
    return Operand(tuple(letters), leading, optional)


def instantiate(rule: Rule, operands: tuple[Shape | None, ...], results: tuple[Shape, ...]) -> Factors:
    """The factors of one call. ``operands``: the shapes, None where an operand is absent. Raises PlanError if they do
    not fit.
    """
    left, right = parse(rule.text)
    present = [(spec, shape) for spec, shape in zip(left, operands, strict=False) if shape is not None]
    missing = [spec for spec, shape in zip(left, operands, strict=False) if shape is None and not spec.optional]
    if missing or len(operands) > len(left) or len(results) != len(right):
        raise PlanError(f"rule {rule.text!r} does not fit a call with {len(operands)} operands, {len(results)} results")
    sizes: dict[str, Size] = {}
    whole: set[str] = set()
    places: list[dict[str, Place]] = []
    for spec, shape in [*present, *zip(right, results, strict=True)]:
        here: dict[str, Place] = {}
        for name, dim in _dims(rule, spec, shape):
            # An operand of size 1 is broadcast along the factor: it does not have it.
            if shape[dim] == 1 and sizes.get(name, 1) != 1:
                continue
            if sizes.get(name, 1) == 1:
                sizes[name] = shape[dim]
            here[name] = Place(dim)
        whole |= {letter.name for letter in spec.letters if letter.whole}
        places.append(here)
    for here, (_, shape) in zip(places, [*present, *zip(right, results, strict=True)], strict=True):
        for name in [n for n, place in here.items() if shape[place.dim] == 1 and sizes[n] != 1]:
            del here[name]
        for name, place in here.items():
            if shape[place.dim] == sizes[name]:
                continue
            if not (isinstance(shape[place.dim], int) and isinstance(sizes[name], int)):
                whole.add(name)  # equal for some batches only
            else:
                raise PlanError(
                    f"rule {rule.text!r}: {name!r} is {sizes[name]} in one operand and {shape[place.dim]} in another"
                )
    count = len(present)
    factors = tuple(
        Factor(
            size=size,
            operands=tuple(here.get(name) for here in places[:count]),
            results=tuple(here.get(name) for here in places[count:]),
            whole=name in whole or size == 1,
            pieces=rule.pieces.get(name),
            invariant=name in rule.invariant,
        )
        for name, size in sizes.items()
    )
    positions = [i for i, shape in enumerate(operands) if shape is not None]
    linear = tuple(frozenset(positions.index(p) for p in group if p in positions) for group in rule.linear)
    return Factors(factors=factors, linear=tuple(group for group in linear if group))


def _dims(rule: Rule, spec: Operand, shape: Shape) -> list[tuple[str, int]]:
    """(factor, dim) pairs of one operand; leading dims are named from the right, so that they broadcast."""
    extra = len(shape) - len(spec.letters)
    if extra < 0 or (extra > 0 and not spec.leading):
        raise PlanError(
            f"rule {rule.text!r}: {' '.join(x.name for x in spec.letters)!r} does not fit a shape of {len(shape)} dims"
        )
    leading = [(f".{extra - dim}", dim) for dim in range(extra)]
    return leading + [(letter.name, extra + i) for i, letter in enumerate(spec.letters)]


def quotient(size: Size, divisor: Size) -> Size | None:
    """``size / divisor`` where it is a whole number for all values of the symbols, else None."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    result = sympy.cancel(sympy.sympify(size) / divisor)
    if not result.is_integer:
        return None
    return int(result) if result.is_number else result


def of_view(source: Shape, target: Shape) -> tuple[Factor, ...]:
    """The factors of a reshape: the common refinement of both shapes; where there is none, a factor that stays
    whole.
    """
    factors: list[Factor] = []
    i = j = 0
    left: Size = source[0] if source else 1
    right: Size = target[0] if target else 1
    outer_left: Size = 1
    outer_right: Size = 1
    while i < len(source) and j < len(target):
        if left == 1:
            i, outer_left = i + 1, 1
            left = source[i] if i < len(source) else 1
            continue
        if right == 1:
            j, outer_right = j + 1, 1
            right = target[j] if j < len(target) else 1
            continue
        inner_right, inner_left = quotient(right, left), quotient(left, right)
        if inner_right is None and inner_left is None:
            return tuple(factors)
        size = left if inner_right is not None else right
        factors.append(
            Factor(size=size, operands=(Place(i, outer_left),), results=(Place(j, outer_right),), whole=False)
        )
        outer_left, outer_right = outer_left * size, outer_right * size
        left = inner_left if inner_right is None else 1
        right = inner_right if inner_right is not None else 1
    return tuple(factors)
