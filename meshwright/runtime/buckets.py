"""Which parameters travel together, and in which groups."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from meshwright.runtime.errors import BundleError
from meshwright.runtime.flat import flatten
from meshwright.runtime.gathered import Gathered, Uses, gather_around
from meshwright.runtime.groups import Groups, Holders
from meshwright.runtime.layout import parse
from meshwright.runtime.parameters import Held
from meshwright.runtime.units import LEVELS, Unit, stages_of
from meshwright.runtime.wire import Finish

BUCKET_BYTES = 25 * 2**20
"""The most that travels together: more would not make the start of a collective any cheaper."""
LEAST_BUCKET_BYTES = 2**20
BUCKETS = 6
"""Small models get about so many buckets: only what is cut can travel beside the backward."""


def make_units(held: Sequence[Held], zero: int, groups: Groups, root: nn.Module, *, once: bool) -> list[Unit]:
    """The units of a rank, each of one of its stages (or of all that share its parameters): by module where parameters
    are gathered (ZeRO-3), else in buckets, last declared first.

    The last declared have their gradients first. Parameters tied across pipeline ranks are ordered by name, because the
    stages declare them in different orders. once: gradients are reduced once per step under ZeRO-2 and 3 too.
    """
    owners = _owners(root)
    keyed: dict[tuple[Any, ...], list[Held]] = {}
    for one in reversed([h for h in held if h.trainable]):
        tied = one.holders if len(one.holders) > 1 else None
        level = _level(one, zero, groups)
        axes = (*one.pending, "pp") if tied else one.pending
        owner = owners.get(id(one.parameter)) if level == 3 and not tied else None
        stages = () if tied else tuple(one.stages)
        keyed.setdefault((str(one.parameter.dtype), axes, tied, level, owner, stages), []).append(one)
    tied_keys = sorted((key for key in keyed if key[2]), key=str)
    under_way: deque[Finish] = deque()
    units = []
    for key in (*(key for key in keyed if not key[2]), *tied_keys):
        _, axes, tied, level, *_ = key
        members = sorted(keyed[key], key=lambda one: one.label) if tied else keyed[key]
        for bucket in [members] if level == 3 else _buckets(members):
            units.append(LEVELS[level](bucket, groups, axes, tied, under_way, once))
    return units


def gather_frozen(held: Sequence[Held], groups: Groups, root: nn.Module) -> list[tuple[list[Held], Gathered]]:
    """ZeRO-3 of frozen parameters, by module: gathered for use, without gradient."""
    owners = _owners(root)
    keyed: dict[tuple[Any, ...], list[Held]] = {}
    for one in held:
        if one.scattered and not one.trainable:
            keyed.setdefault((one.parameter.dtype, owners.get(id(one.parameter))), []).append(one)
    return [
        (members, Gathered(flatten([one.parameter for one in members], groups.size("dp")), groups, stages_of(members)))
        for members in keyed.values()
    ]


def gather_in_modules(
    root: nn.Module, units: Sequence[Unit], frozen: Sequence[tuple[list[Held], Gathered]], *, stay: bool
) -> Uses:
    """Let the modules gather the parameters that they own (ZeRO-3). Raises BundleError for one that nobody owns.

    stay: whether they stay whole until the last backward of the step.
    """
    of_parameter = {id(h.parameter): unit.gathered for unit in units if unit.gathered for h in unit.held}
    of_parameter |= {id(h.parameter): gathered for members, gathered in frozen for h in members}
    homeless = set(of_parameter) - {id(p) for p in root.parameters()}
    for one in (h for members in (*(unit.held for unit in units), *(m for m, _ in frozen)) for h in members):
        if id(one.parameter) in homeless:
            raise BundleError(
                f"{one.label} is no attribute of a module of the stage file: ZeRO-3 gathers it when its module runs\n"
                "  assign what param(...) returns to self.<name>"
            )
    uses = Uses(list(dict.fromkeys(of_parameter.values())), stay)
    for module in root.modules():
        own = dict.fromkeys(map(id, module.parameters(recurse=False)))
        gathered = list(dict.fromkeys(of_parameter[p] for p in own if p in of_parameter))
        if gathered:
            inside = set(map(id, module.parameters()))
            waiting = [unit for unit in units if any(id(h.parameter) in inside for h in unit.held)]
            gather_around(module, gathered, uses, partial(_are_done, waiting))
    return uses


def _are_done(units: Sequence[Unit]) -> bool:
    return all(unit.waiting == 0 for unit in units)


def _level(one: Held, zero: int, groups: Groups) -> int:
    """What ZeRO does with a parameter: nothing without dp, all but the last step for one that rests whole."""
    if "dp" not in one.pending or groups.size("dp") == 1:
        return 0
    return zero if one.scattered else min(zero, 2)


def _owners(root: nn.Module) -> dict[int, str]:
    """The first module that owns a parameter, by id of the parameter."""
    owners: dict[int, str] = {}
    for name, module in root.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), name)
    return owners


def _buckets(members: Sequence[Held]) -> Iterator[list[Held]]:
    total = sum(one.parameter.nbytes for one in members)
    limit = min(BUCKET_BYTES, max(LEAST_BUCKET_BYTES, total // BUCKETS))
    bucket: list[Held] = []
    size = 0
    for one in members:
        if bucket and size + one.parameter.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(one)
        size += one.parameter.nbytes
    yield bucket


def needed_groups(manifest: Mapping[str, Any], placement: Sequence[int]) -> list[tuple[tuple[str, ...], Holders]]:
    """Every set of axes (and pipeline ranks) that some gradient is summed over, in an order that all ranks share."""
    found: dict[tuple[tuple[str, ...], Holders], None] = {}
    for entry in manifest["parameters"].values():
        holders = tuple(sorted({placement[stage] for stage in entry["stages"]}))
        tied = holders if len(holders) > 1 else None
        for part in entry.get("segments") or [{"types": {}}]:
            types = {**entry["types"], **part["types"]}
            pending = tuple(a for a in manifest["mesh"] if a in types and parse(types[a])[1] == "R")
            axes = (*pending, "pp") if tied else pending
            for choice in (axes, tuple(a for a in axes if a != "dp")):
                found.setdefault((choice, tied))
    return list(found)
