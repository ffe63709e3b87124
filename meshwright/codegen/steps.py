"""The step of a bundle on paper, from its manifest alone: its schedule, and the costs that it was compiled with."""

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.compiler.errors import BundleError
from meshwright.passes.schedules import Compute, Costs, Edge, Order, Placement, Row, Simulation, simulate
from meshwright.runtime.actions import parse, stage_of, stages_on
from meshwright.runtime.groups import placement_of


def step_of(manifest: Mapping[str, Any]) -> Simulation:
    """The step in time, in seconds and bytes. Raises BundleError for a manifest without costs."""
    rows, placement = [parse(row, "stage") for row in manifest["schedule"]], placement_of(manifest)
    return simulate(orders_of(rows, placement), placement, edges_of(manifest), _costs(manifest))


def edges_of(manifest: Mapping[str, Any]) -> list[Edge]:
    """What goes between stages, and whether its gradient comes back."""
    return [
        (source, to, edge["requires_grad"])
        for source, stage in enumerate(manifest["stages"])
        for edge in stage["sends"].values()
        for to in edge["to"]
    ]


def orders_of(rows: Sequence[Row], placement: Placement) -> tuple[Order, ...]:
    """What every pipeline rank computes, from its actions; ``placement`` is the rank of every stage."""
    own = [stages_on(placement, rank) for rank in range(len(rows))]
    return tuple(
        tuple(Compute(action.kind, stage_of(action, own[rank]), action.microbatch) for action in row if action.runs)
        for rank, row in enumerate(rows)
    )


def figures_of(manifest: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a table: of the step and of each pipeline rank."""
    step = step_of(manifest)
    whole = step.makespan * len(step.ranks) or 1.0
    rows = [["step", _time(step.makespan), f"bubble {step.bubble_share:.1%}", f"idle {sum(step.idle) / whole:.1%}", ""]]
    for rank, (spans, busy, bubble, idle, peak) in enumerate(
        zip(step.ranks, step.busy, step.bubbles, step.idle, step.peaks, strict=True)
    ):
        stages = ", ".join(map(str, sorted({span.compute.stage for span in spans})))
        rows.append(
            [
                f"pipeline rank {rank} (stage {stages})",
                f"{_time(busy)} busy",
                f"bubble {bubble / (step.makespan or 1.0):.1%}",
                f"idle {idle / (step.makespan or 1.0):.1%}",
                f"at most {peak:,.0f} B of activations",
            ]
        )
    return rows


def _costs(manifest: Mapping[str, Any]) -> Costs:
    try:
        every = [stage["costs"] for stage in manifest["stages"]]
        columns = {
            kind: tuple(float(costs[kind]) for costs in every)
            for kind in ("forward", "inputs", "weights", "activations")
        }
        return Costs(**columns, message=float(manifest["message"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"the manifest says nowhere what its stages cost, or not so that it can be read: {error}\n"
            "  compile the model again"
        ) from error


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
