"""explain: every parameter and conversion of a program as aligned text, from the manifest alone."""

from collections.abc import Iterable, Mapping
from typing import Any

from meshwright.codegen.edges import edge_names
from meshwright.codegen.manifest import manifest_of
from meshwright.codegen.steps import figures_of
from meshwright.compiler.program import Lowered
from meshwright.passes.cost import FEATURES, TOKENS


def explain(lowered: Lowered) -> str:
    """The report of a compiled program."""
    return explain_manifest(manifest_of(lowered, edge_names(lowered)))


def explain_manifest(manifest: Mapping[str, Any]) -> str:
    """The report of a bundle."""
    plan = manifest["plan"]
    mesh = " · ".join(f"{axis}={size}" for axis, size in manifest["mesh"].items()) or "one rank"
    symbols = ", ".join(f"{name} = {size}" for name, size in manifest["symbols"].items())
    lines = [
        f"{manifest['model']} on {mesh}",
        f"  microbatches {plan['microbatches']}, schedule {plan['schedule']}{' (auto)' if plan['auto'] else ''}, "
        f"ZeRO-{plan['zero']}, "
        f"sequence parallel {'yes' if plan['sequence_parallel'] else 'no'}",
        f"  symbolic sizes: {symbols or 'none'} in the example",
        *[f"  fixed size: {reason}" for reason in manifest["fixed"]],
        *[f"  warning: {warning}" for warning in manifest["warnings"]],
        "",
        "stages",
        *_table(_stage_rows(manifest)),
        "",
        f"a step in time, {_OF[manifest['times']]}",
        *_table(figures_of(manifest)),
        "",
        "parameters (type at rest -> in use on each axis)",
        *_table(_parameter_rows(manifest)),
        "",
        "conversions of activations (bytes of the whole value on one replica and microbatch)",
        *(_table(_conversion_rows(manifest)) or ["  none"]),
    ]
    return "\n".join(line.rstrip() for line in lines)


_OF = {
    "measured": "by measured times",
    "modelled": f"modelled for accelerators, microbatches of {TOKENS:,} tokens and features of at least {FEATURES:,}",
}


def _stage_rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for k, stage in enumerate(manifest["stages"]):
        ranks = stage["ranks"]
        shown = ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]} ... {ranks[-1]} ({len(ranks)})"
        receives = ", ".join(f"{name} from {edge['from']}" for name, edge in stage["receives"].items())
        sends = ", ".join(f"{name} to {', '.join(map(str, edge['to']))}" for name, edge in stage["sends"].items())
        rows.append([f"stage {k}", f"ranks {shown}", f"receives {receives or '-'}", f"sends {sends or '-'}"])
    return rows


def _parameter_rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    """One row a parameter; repeated layers with the same types are one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, entry in manifest["parameters"].items():
        parts = entry.get("segments") or [{"types": {}}]
        for part in parts:
            types = {**entry["types"], **part["types"]}
            piece = f"[{part['start']}:{part['start'] + part['length']}]" if "start" in part else ""
            text = ", ".join(f"{axis} {held}" for axis, held in types.items())
            rows.setdefault((_pattern(name) + piece, str(tuple(entry["shape"])), text), []).append(name)
    return [
        [
            pattern if len(names) > 1 else names[0] + pattern.partition("[")[1] + pattern.partition("[")[2],
            shape,
            text,
            f"x{len(names)}" if len(names) > 1 else "",
        ]
        for (pattern, shape, text), names in rows.items()
    ]


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _conversion_rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"stage {row['stage']}",
            row["in"] if row["times"] == 1 else f"{row['in']} x{row['times']}",
            row["name"],
            f"({', '.join(map(str, row['shape']))})",
            f"{row['axis']} {row['from']} -> {row['to']}",
            f"{row['bytes']:,} B",
            row["at"],
        ]
        for row in manifest["explain"]
    ]


def _table(rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
