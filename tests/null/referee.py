"""An independent referee: emitted stages under the checker of ``spmd-types``, as one rank of a fake process group.

The package implements the published theory of the types R, I, V and P (https://github.com/meta-pytorch/spmd_types).
Every operator of a stage runs in its strict mode on this rank's pieces, on all mesh axes at once, microbatches among
them; our S(d) is its V. None of our rules takes part: the referee is told the manifest's types of inputs, parameters
and edges and, line by line, what the margin of the stage file says, and finds the rest itself.
"""

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import spmd_types as spmd
import torch
import torch.nn.functional as F
from spmd_types import I, P, R, S, V, _mesh_axis
from spmd_types._checker import _OP_REGISTRY, OpLinearity, _OpSpec
from spmd_types._testing import fake_pg
from spmd_types.checker import typecheck
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from meshwright.runtime.batches import microbatch_parts, replica_part
from meshwright.runtime.groups import Groups, current, num_ranks, placement_of, using
from meshwright.runtime.layout import Split, parse, shard_bounds
from meshwright.runtime.manifest import load_manifest
from meshwright.runtime.parameters import Declared, Param
from meshwright.runtime.weights import Weights

KINDS = {"R": R, "I": I, "P": P}

LINEAR: Mapping[Callable[..., Any], str] = {
    torch.Tensor.__getitem__: "slices and numbers choose elements, as its narrow and select do",
}
"""Operators that pass P and are not in the referee's table, where all others count as not linear -> why they do.

The package documents hooks for autograd functions alone, so these are put into its table itself.
"""


@contextmanager
def judged(sizes: Mapping[str, int]) -> Iterator[None]:
    """Operators inside are checked, strictly, as those of rank 0 of a mesh of ``sizes``."""
    known = {operator: _OpSpec(OpLinearity.LINEAR, (0,)) for operator in LINEAR}
    try:
        with fake_pg(num_ranks(sizes)):
            mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            with spmd.set_current_mesh(mesh), patch.dict(_OP_REGISTRY, known), typecheck():
                yield
    finally:
        _mesh_axis._reset()  # it keeps names of axes by process group, of which there is a new one every time


# The runtime's vocabulary in the referee's


def _invariant_to_replicated(x: torch.Tensor, axis: str) -> Any:
    return spmd.invariant_to_replicate(x, axis)


def _replicated_to_partial(x: torch.Tensor, axis: str) -> Any:
    return spmd.convert(x, axis, src=R, dst=P)


def _all_reduce(x: torch.Tensor, axis: str) -> Any:
    return spmd.all_reduce(_partial(x, axis), axis, src=P, dst=I)


def _partial(x: torch.Tensor, axis: str) -> torch.Tensor:
    """``x``, which a margin said is P: the referee would sum pieces of a split value as well."""
    if (type_ := spmd.get_axis_local_type(x, axis)) is not P:
        raise spmd.SpmdTypeError(f"a sum over {axis} of what is {type_.value}")
    return x.contiguous()


def _all_gather(x: torch.Tensor, axis: str, *, dim: int, to: str, groups: int = 1, size: int | None = None) -> Any:
    dim = dim % x.ndim
    parts = x.unflatten(dim, (groups, -1))
    whole = spmd.all_gather(parts, axis, src=S(dim + 1), dst=KINDS[to]).flatten(dim, dim + 1)
    return whole if size is None else whole.narrow(dim, 0, size)  # rank 0 has one of the longer pieces


def _reduce_scatter(x: torch.Tensor, axis: str, *, dim: int, groups: int = 1, size: int | None = None) -> Any:
    dim = dim % x.ndim
    parts = _even(_partial(x, axis), axis, dim).unflatten(dim, (groups, -1))
    return spmd.reduce_scatter(parts, axis, src=P, dst=S(dim + 1)).flatten(dim, dim + 1)


def _shard(x: torch.Tensor, axis: str, *, dim: int, of: str, groups: int = 1, size: int | None = None) -> Any:
    dim = dim % x.ndim
    parts = _even(x, axis, dim).unflatten(dim, (groups, -1))
    return spmd.shard(parts, axis, src=KINDS[of], dst=S(dim + 1)).flatten(dim, dim + 1)


def _even(x: torch.Tensor, axis: str, dim: int) -> torch.Tensor:
    """``x`` with zeros behind it, so that all pieces are as long as that of rank 0; its types are what they were."""
    if not (missing := -x.shape[dim] % current().size(axis)):
        return x
    with spmd.no_typecheck():
        longer = F.pad(x, (*(0, 0) * (x.ndim - 1 - dim), 0, missing))
    return spmd.assert_type(longer, spmd.get_local_type(x))  # type: ignore[no-any-return]


def _all_to_all(x: torch.Tensor, axis: str, *, split_dim: int, concat_dim: int) -> Any:
    return spmd.all_to_all(x, axis, src=S(concat_dim % x.ndim), dst=S(split_dim % x.ndim))


def _shard_range(length: int, axis: str) -> Any:
    start, stop = shard_bounds(length, current().index(axis), current().size(axis))
    types = {other: V if other == axis else R for other in spmd.current_mesh_names() or {}}
    return spmd.Scalar(start, types), spmd.Scalar(stop, types)


def _part_of_mean(x: torch.Tensor, *axes: str) -> Any:
    return x / math.prod(current().size(axis) for axis in axes)


def _batch_norm(x: torch.Tensor, mean: Any, var: Any, weight: Any, bias: Any, training: bool, **options: Any) -> Any:
    """Statistics over all pieces are the same everywhere: what is left is by element, as of one piece's own."""
    return F.batch_norm(x, None, None, weight, bias, True, eps=options["eps"])


def _store(buffer: torch.Tensor, value: torch.Tensor, training: bool, *, every: str = "microbatch") -> None:
    """What is stored lies as the buffer does, but microbatches may store one after another."""
    axes = [axis for axis in of({}) if axis != "mb" or every == "step"]
    hold(value.detach(), {axis: spmd.get_axis_local_type(buffer, axis) for axis in axes})


VOCABULARY: Mapping[str, Callable[..., Any]] = {
    "invariant_to_replicated": _invariant_to_replicated,
    "replicated_to_partial": _replicated_to_partial,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "shard": _shard,
    "all_to_all": _all_to_all,
    "shard_range": _shard_range,
    "part_of_mean": _part_of_mean,
    "batch_norm": _batch_norm,
    "store": _store,
}
"""Name in ``meshwright.runtime`` -> the referee's own conversion; a stage that uses another name is not judged."""


# What the referee is told, and holds us to


def hold(x: torch.Tensor, types: Mapping[str, Any]) -> torch.Tensor:
    """Raises SpmdTypeError where ``x`` is not of ``types``; one that has none yet is of these types from here on."""
    types = dict(types)
    for axis, type_ in dict(types).items() if spmd.has_local_type(x) and not x.requires_grad else ():
        found = spmd.get_axis_local_type(x, axis)
        if {type_, found} == {R, I}:
            # Without a gradient the two are the same value; the referee has a conversion for just that.
            spmd.reinterpret_no_grad(x, axis, dst=type_)
        if (type_, found) == (V, R):
            # A piece of a constant: the referee takes zeros and the like for R, which mixes with V.
            del types[axis]
    # V where we say P is accepted, and P from here on: a contraction over a split dim is V to local types, and it is
    # for the program to say that its ranks' results are to be summed. R or I where we say P is refused.
    return spmd.assert_type(x, types) if types else x


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedParam(Param):
    """The runtime's ``param``, whose parameters have the types in use that the manifest declares."""

    def __call__(self, name: str, shape: Any, *, segment: Any = None, **types: str) -> nn.Parameter:
        parameter = Param.__call__(self, name, shape, segment=segment, **types)
        if not spmd.has_local_type(parameter):
            (held,) = (h for h in self.declared.held.values() if h.parameter is parameter)
            # Microbatches use one parameter and add up its gradients.
            hold(parameter, of(held.types, mb="R"))
        return parameter

    def buffer(self, name: str, shape: Any, **types: str) -> torch.Tensor:
        buffer = Param.buffer(self, name, shape, **types)
        return buffer if spmd.has_local_type(buffer) else hold(buffer, of(types))


def of(texts: Mapping[str, str], **more: str) -> dict[str, Any]:
    """The types in use on all axes of the mesh; an axis that is not named has "I"."""
    texts = {**texts, **more}
    used = {axis: parse(texts.get(axis, "I"))[1] for axis in spmd.current_mesh_names() or {}}
    return {axis: V if isinstance(use, Split) else KINDS[use] for axis, use in used.items()}


def _margins(text: str) -> dict[int, str]:
    """Line number -> what its margin says."""
    lines = dict(enumerate(text.splitlines(), 1))
    found = {number: margin for number, line in lines.items() if (margin := line.partition("  # (")[2])}
    for number in list(found):
        # Rows looked up in a piece of a table are partial when those of the other ranks are zero, a line later.
        if ".masked_fill(elsewhere" in lines.get(number + 1, "") and " P" in found[number]:
            found.setdefault(number + 1, found[number])
            del found[number]
    return found


class _Claims(ast.NodeTransformer):
    """Puts what the margin says of a line around the value of the line."""

    def __init__(self, margins: Mapping[int, str]):
        self.margins = margins

    def _claimed(self, node: Any) -> Any:
        if margin := self.margins.get(node.end_lineno):
            if " -> " in margin and isinstance(node.value, ast.Call):
                # What is converted: its own line may have had no room for a margin.
                before = re.sub(r" -> \S+", "", margin)
                node.value.args[0] = _call("partial_term", node.value.args[0], before)
            node.value = _call("claimed", self._terms(node.value, margin), margin)
        return node

    def _terms(self, node: ast.expr, margin: str) -> ast.expr:
        """A sum is P where all its terms are, also those without a line and a margin of their own."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            left, right = self._terms(node.left, margin), self._terms(node.right, margin)
            return ast.BinOp(_call("partial_term", left, margin), node.op, _call("partial_term", right, margin))
        return node

    visit_Assign = visit_Return = _claimed


def _call(name: str, value: ast.expr, margin: str) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), [value, ast.Constant(margin)], [])


def claimed(value: Any, margin: str) -> Any:
    """``value``, held to the types of a margin: ``B, T, 64/tp)  dp P`` or, of a conversion, ``B, T)  tp P -> I``."""
    for x in value if isinstance(value, tuple) else (value,):
        hold(x, _said(margin))
    return value


def partial_term(value: Any, margin: str) -> Any:
    """``value``, held to the types P of a margin."""
    types = {axis: type_ for axis, type_ in _said(margin).items() if type_ is P}
    return hold(value, types) if isinstance(value, torch.Tensor) else value


def _said(margin: str) -> dict[str, Any]:
    shape, _, types = margin.partition("  ")
    axes = spmd.current_mesh_names() or {}
    said: dict[str, Any] = {axis: V for axis in re.findall(r"/(\w+)", shape) if axis in axes}
    for part in types.split(" · ") if types else ():
        axis, _, type_ = part.partition(" ")
        said[axis] = of({axis: type_.rpartition(" -> ")[2]})[axis]
    return said


def judge(directory: Path, batch: Mapping[str, Any], names: Mapping[str, Any] | None = None) -> None:
    """Run the forward of every stage of a bundle before the referee, on what the stages before it sent.

    names: what else the stages may call. Raises SpmdTypeError for the first line that the referee objects to.
    """
    manifest = load_manifest(directory)
    microbatches = manifest["plan"]["microbatches"]
    sizes = {a: n for a, n in {**manifest["mesh"], "mb": microbatches}.items() if a != "pp" and n > 1}
    inputs = manifest["inputs"]
    sent: dict[tuple[int, str], torch.Tensor] = {}
    part = replica_part(batch, inputs, 0, manifest["mesh"].get("dp", 1), microbatches)
    values = microbatch_parts(part, inputs, microbatches)[0]
    with judged(sizes):
        for index, entry in enumerate(manifest["stages"]):
            groups = Groups(
                sizes=manifest["mesh"], rank=entry["ranks"][0], device=torch.device("cpu"), microbatches=microbatches
            )
            with using(groups):
                stage = _stage(directory, manifest, index, groups, names or {})
                arguments = inspect.signature(stage.forward).parameters
                given = {n: _given(values[n], inputs[n]["types"]) for n in entry["inputs"]}
                for name, edge in entry["receives"].items():
                    given[name] = sent[edge["from"], name].detach().requires_grad_(edge["requires_grad"])
                if entry["prepares"]:
                    given |= _prepared(stage, part, inputs, entry["prepares"])
                result = stage(**{name: given[name] for name in arguments})
            if index == manifest["loss"]["stage"]:
                hold(result, of(manifest["loss"]["types"]))
            else:
                results = result if isinstance(result, tuple) else (result,)
                for (name, edge), value in zip(entry["sends"].items(), results, strict=True):
                    assert value.requires_grad == edge["requires_grad"], name
                    sent[index, name] = hold(value, of(edge["types"]))


def _stage(
    directory: Path, manifest: Mapping[str, Any], index: int, groups: Groups, more: Mapping[str, Any]
) -> nn.Module:
    """A stage in the referee's vocabulary, its parameters typed."""
    path = directory / manifest["stages"][index]["file"]
    text = path.read_text()
    tree = ast.fix_missing_locations(_Claims(_margins(text)).visit(ast.parse(text)))
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(tree, str(path), "exec"), names)
    used = [n for n, v in names.items() if (getattr(v, "__module__", None) or "").startswith("meshwright.")]
    names |= {name: VOCABULARY[name] for name in used}
    names |= {"claimed": claimed, "partial_term": partial_term, **more}
    own = Weights(directory / "weights", seed=0)
    declared = Declared(manifest=manifest, placement=placement_of(manifest), groups=groups, source=own, own=own)
    with spmd.no_typecheck():
        stage: nn.Module = names["Stage"](JudgedParam(declared=declared, stage=index))
    return stage


def _prepared(stage: Any, part: Mapping[str, Any], inputs: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """What a stage prepares from all microbatches together, which all of them use."""
    wanted = inspect.signature(stage.prepare).parameters
    with torch.no_grad():
        result = stage.prepare(**{n: _given(part[n], {**inputs[n]["types"], "mb": "I"}) for n in wanted})
    results = result if isinstance(result, tuple) else (result,)
    return {name: hold(value, of({})) for name, value in zip(names, results, strict=True)}


def _given(value: Any, types: Mapping[str, str]) -> Any:
    """A value of the batch with its types."""
    if not isinstance(value, torch.Tensor):
        return value
    with spmd.no_typecheck():
        untyped = value.detach()
    return hold(untyped, of(types))
