"""What the user decides about the parallel program; every choice has a default."""

import dataclasses
import difflib
import fnmatch
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meshwright.compiler.errors import PlanError, UnsupportedError
from meshwright.compiler.mesh import AXES
from meshwright.compiler.types import Type, parse_type
from meshwright.runtime.promises import RESHARD

SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved",
    "looped-bfs",
    "zb-h1",
    "zb-h2",
    "interleaved-zb",
    "zbv",
    "dualpipe-v",
    "v-half",
    "v-min",
)
AUTO = "auto"
RANDOM = ("fast", "exact")
BATCH_STATISTICS = ("batch", "microbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The choices of a compilation. Raises PlanError for a value that does not exist, UnsupportedError for one to come.

    zero: 0 keeps everything whole on every dp rank; 1 splits the optimizer state; 2 the gradients too; 3 the
    parameters too.
    reshard: for how long ZeRO-2 and 3 hold whole what they split. "step": a stage's parameters (ZeRO-3) are gathered at
    their first use in a step and stay until the stage's last backward; gradients are added up whole over the
    microbatches and reduced once, beside what remains. "microbatch": parameters are gathered for each use, twice per
    microbatch (three times where the backward comes in two parts), and gradients reduced in every backward: the least
    memory. None: "step" in a pipeline, else "microbatch".
    microbatches: pieces that a step's batch is cut into in time; None: as many as the pipeline has ranks.
    schedule: order of forwards and backwards over the pipeline: one of ``SCHEDULES``; "auto" for the one of them with
    the shortest simulated step; or a user's own, as the path of a .csv in the format of torch.distributed.pipelining,
    or as a function from a ``passes.schedules.Pipeline`` to what each of its ranks computes, in order. Whatever it is,
    it is proven before it is used.
    stages_per_rank: how many stages ("chunks", "virtual stages") every pipeline rank runs; None: as the schedule does,
    2 where it runs any number of them, and "auto" tries 1 to 4. Which stages a rank runs follows from the schedule.
    split: names of the modules where the 2nd, 3rd, ... stage begins; None: balanced by time.
    times: measured times of modules, which take the place of modelled ones: a file that ``meshwright profile`` wrote,
    or {module: {"forward": seconds, "inputs": seconds, "weights": seconds}} for one microbatch.
    max_activation_bytes: what schedule="auto" may keep alive on a rank, by the model of what forwards keep.
    sequence_parallel: True lets the tensor axis split the sequence where activations would be whole on it.
    recompute: "none".
    precision: None keeps the model's dtypes; "fp64" reads every floating dtype as float64, for proofs.
    compile: True lets the runtime torch.compile the blocks, each once for all its instances (and for all sizes that
    inductor keeps symbolic, which those of convolutions are not); where ranks are threads of one process, never.
    random: what dropout and noise draw by: "fast" by torch's own generator, seeded for each piece of a tensor; "exact"
    by the position of each element, the same on every mesh.
    batch_statistics: what forward takes the statistics of that batch norms divide by and buffers keep: "batch", the
    whole batch of a step, which cannot be had in several microbatches; "microbatch", each by itself (over all dp ranks)
    and one after the other, as one device does that accumulates gradients over microbatches.
    pins: types at rest of parameters by name pattern, as in {"*.up_proj.weight": {"tp": "S(0)"}}; whole is "I".
    """

    zero: int = 0
    reshard: Literal["step", "microbatch"] | None = None
    microbatches: int | None = None
    schedule: str | os.PathLike[str] | Callable[[Any], Any] = "1f1b"
    stages_per_rank: int | None = None
    split: tuple[str, ...] | None = None
    times: str | Path | Mapping[str, Mapping[str, float]] | None = None
    max_activation_bytes: float | None = None
    sequence_parallel: bool = False
    recompute: str = "none"
    precision: Literal["fp64"] | None = None
    compile: bool = False
    random: Literal["fast", "exact"] = "fast"
    batch_statistics: Literal["batch", "microbatch"] = "batch"
    pins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise PlanError(f"zero={self.zero!r}: the stages of ZeRO are 0, 1, 2 and 3")
        if self.reshard not in (*RESHARD, None):
            raise PlanError(
                f"reshard={self.reshard!r}: what ZeRO gathers is whole for each {' or for each '.join(RESHARD)}"
            )
        if self.microbatches is not None and (not isinstance(self.microbatches, int) or self.microbatches < 1):
            raise PlanError(f"microbatches={self.microbatches!r}: a whole number from 1, or None")
        names = (*SCHEDULES, AUTO)
        if isinstance(self.schedule, os.PathLike):
            object.__setattr__(self, "schedule", os.fspath(self.schedule))
        if not isinstance(self.schedule, str) and not callable(self.schedule):
            raise PlanError(f"schedule={self.schedule!r}: a name, a .csv file or a function")
        if isinstance(self.schedule, str) and self.schedule not in names and not self.schedule.endswith(".csv"):
            near = difflib.get_close_matches(self.schedule.lower(), names, n=1)
            hint = f"\n  did you mean {near[0]!r}?" if near else ""
            raise PlanError(
                f"unknown schedule {self.schedule!r}: the schedules are {', '.join(names)}, a .csv file or a "
                f"function{hint}"
            )
        if self.stages_per_rank is not None and (not isinstance(self.stages_per_rank, int) or self.stages_per_rank < 1):
            raise PlanError(f"stages_per_rank={self.stages_per_rank!r}: a whole number from 1, or None")
        if self.split is not None:
            if isinstance(self.split, str):
                raise PlanError(f"split={self.split!r}: a list of module names, one for each stage after the first")
            object.__setattr__(self, "split", tuple(self.split))
        if self.max_activation_bytes is not None:
            if not isinstance(self.max_activation_bytes, (int, float)) or not self.max_activation_bytes > 0:
                raise PlanError(f"max_activation_bytes={self.max_activation_bytes!r}: a number of bytes, or None")
            if self.schedule != AUTO:
                raise PlanError(
                    f"max_activation_bytes={self.max_activation_bytes!r} with schedule={self.schedule_name!r}: only "
                    f"schedule={AUTO!r} chooses by it"
                )
        if self.recompute != "none":
            raise UnsupportedError(f"recompute={self.recompute!r} is not supported yet: use 'none'")
        if self.precision not in (None, "fp64"):
            raise UnsupportedError(f"precision={self.precision!r} is not supported yet: use None or 'fp64'")
        if not isinstance(self.compile, bool):
            raise PlanError(f"compile={self.compile!r}: True or False")
        if self.random not in RANDOM:
            raise PlanError(f"random={self.random!r}: random numbers are drawn {' or '.join(map(repr, RANDOM))}")
        if self.batch_statistics not in BATCH_STATISTICS:
            chosen = f"batch_statistics={self.batch_statistics!r}"
            raise PlanError(f"{chosen}: statistics are of the whole {' or of each '.join(BATCH_STATISTICS)}")
        for pattern, types in self.pins.items():
            for axis, text in types.items():
                if axis not in AXES or axis == "pp":
                    raise PlanError(f"pin {pattern!r} names the axis {axis!r}: parameters are pinned on dp or tp")
                if parse_type(text).kind not in "SI":
                    raise PlanError(f"pin {pattern!r}: {axis}={text!r} is no type at rest; those are I and S(dim)")

    @staticmethod
    def from_dict(choices: Mapping[str, Any]) -> "Plan":
        """A plan from plain data, such as a TOML file. Raises PlanError for an unknown choice."""
        known = {f.name for f in dataclasses.fields(Plan)}
        for name in choices:
            if name not in known:
                raise PlanError(f"unknown choice {name!r} in the plan: the choices are {', '.join(sorted(known))}")
        return Plan(**choices)

    @property
    def schedule_name(self) -> str:
        """The schedule as text: its name, its file, or ``name()`` of a function, which is no name of ours."""
        return (
            self.schedule if isinstance(self.schedule, str) else f"{getattr(self.schedule, '__name__', 'function')}()"
        )

    def num_microbatches(self, num_ranks: int) -> int:
        """Microbatches of a step on a pipeline of ``num_ranks``."""
        return self.microbatches or num_ranks

    def resharded(self, num_ranks: int) -> str:
        """For how long ZeRO holds whole what it splits, on a pipeline of ``num_ranks``."""
        return self.reshard or ("step" if num_ranks > 1 else "microbatch")

    def pinned(self, names: tuple[str, ...], axis: str) -> tuple[str, Type] | None:
        """The pattern and the type that pin a parameter (by any of its ``names``) on ``axis``, or None.

        Raises PlanError when two patterns pin it to different types.
        """
        found: tuple[str, Type] | None = None
        for pattern, types in self.pins.items():
            if axis not in types or not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                continue
            type_ = parse_type(types[axis])
            if found is not None and found[1] != type_:
                raise PlanError(
                    f"two pins contradict each other on {names[0]!r}: {found[0]!r} wants {axis}={found[1]}, "
                    f"{pattern!r} wants {axis}={type_}\n  keep one of them"
                )
            found = (pattern, type_)
        return found
