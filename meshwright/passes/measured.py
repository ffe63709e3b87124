"""Measured times of modules in the place of modelled ones."""

import difflib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from meshwright.compiler.errors import PlanError
from meshwright.compiler.frames import module_stack
from meshwright.passes.cost import Times


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Times by node, and how many times as long as modelled the measured modules take: the median of them."""

    times: Mapping[fx.Node, Times]
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Seconds of one microbatch by module path, "" for what the model's own forward does. source: for messages."""

    modules: Mapping[str, Times]
    source: str

    def fit(self, whole: Mapping[fx.Node, Times], local: Mapping[fx.Node, Times]) -> Fitted:
        """Deal the time of each module out to its nodes by their modelled times; nodes in no measured module keep
        theirs, times the median ratio.

        whole, local: modelled times of nodes as they were measured, and on a rank. Raises PlanError where no node is in
        a measured module.
        """
        members: dict[str, list[fx.Node]] = {}
        for node in whole:
            inner = next((path for path in reversed(_paths(node)) if path in self.modules), None)
            if inner is not None:
                members.setdefault(inner, []).append(node)
        if not any(sum(whole[node]) for nodes in members.values() for node in nodes):
            raise PlanError(self._of_another_model({path: None for node in whole for path in _paths(node) if path}))
        times: dict[fx.Node, Times] = {}
        ratios = []
        for path, nodes in members.items():
            modelled = sum((whole[node] for node in nodes), Times())
            if sum(modelled):
                ratios.append(sum(self.modules[path]) / sum(modelled))
            times |= {node: _dealt(self.modules[path], whole[node], modelled, local[node]) for node in nodes}
        ratio = statistics.median(ratios)
        return Fitted(times={node: times.get(node, local[node] * ratio) for node in whole}, ratio=ratio)

    def _of_another_model(self, known: Mapping[str, None]) -> str:
        name = next(iter(self.modules), "")
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[:3]
        return (
            f"{self.source} has times of {len(self.modules)} modules, {name!r} the first, of which the model runs "
            f"none\n  near it: {', '.join(near)}\n  measure this model with: meshwright profile"
        )


def _paths(node: fx.Node) -> list[str]:
    """The modules around a node, outermost first; a block itself is the innermost that counts."""
    if node.op != "call_module":
        return [path for path, _ in module_stack(node)]
    parts = str(node.target).split(".")
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def _dealt(measured: Times, whole: Times, modelled: Times, local: Times) -> Times:
    """A node's part of the measured time of its module, for forward and both backwards each. Where none of a kind is
    modelled it goes by the whole time.
    """
    part = sum(whole) / (sum(modelled) or 1.0)
    cut = sum(local) / (sum(whole) or 1.0)
    return Times(
        *(
            seconds * (here / every if every else part * cut)
            for seconds, here, every in zip(measured, local, modelled, strict=True)
        )
    )


def read_times(times: str | Path | Mapping[str, Mapping[str, float]] | None) -> Measured | None:
    """Times from a file that ``meshwright profile`` wrote, or as a mapping of what stands there under "seconds".

    Raises PlanError for what cannot be read.
    """
    if times is None:
        return None
    source = "times" if isinstance(times, Mapping) else f"times={str(times)!r}"
    found: Any = times if isinstance(times, Mapping) else _loaded(Path(times), source)
    modules = {}
    for path, entry in found.items():
        fields = dict(entry) if isinstance(entry, Mapping) else {}
        if set(fields) != set(Times._fields) or not all(_is_time(seconds) for seconds in fields.values()):
            raise PlanError(
                f"{source}: {path!r} has {entry!r}\n  a module has seconds from 0 for {', '.join(Times._fields)}"
            )
        modules[path] = Times(**fields)
    return Measured(modules=modules, source=source)


def _loaded(path: Path, source: str) -> Any:
    try:
        seconds = json.loads(path.read_text())["seconds"]
    except OSError as error:
        raise PlanError(f"{source} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{source} is no file that meshwright profile wrote: {error}") from error
    if not isinstance(seconds, dict):
        raise PlanError(f"{source} is no file that meshwright profile wrote: 'seconds' is no table")
    return seconds


def _is_time(seconds: Any) -> bool:
    return isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < float("inf")
