"""The Trainer: what a user's script holds on a rank."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshwright.runtime import checkpoint, gathering, recording
from meshwright.runtime.actions import Kind, forwards
from meshwright.runtime.batches import Batch, microbatch_parts, named, replica_part, symbols_of
from meshwright.runtime.buckets import gather_frozen, gather_in_modules, make_units, needed_groups
from meshwright.runtime.deferred import Running
from meshwright.runtime.errors import BundleError, MeshwrightError, PlanError, RankError
from meshwright.runtime.executor import Executor, Timed, Turn
from meshwright.runtime.groups import placement_of, start, using
from meshwright.runtime.manifest import actions_of, load_manifest, stage_class
from meshwright.runtime.messages import Links
from meshwright.runtime.parameters import Declared, Param
from meshwright.runtime.promises import check_evaluation
from meshwright.runtime.recording import clock_of
from meshwright.runtime.stage import StageRun
from meshwright.runtime.traces import chrome_trace
from meshwright.runtime.weights import Weights
from meshwright.runtime.wire import Finish

Named = list[tuple[str, nn.Parameter]]


class Trainer:
    """Trains a bundle on this rank.

    bundle: its directory. optimizer: takes this rank's ``(name, parameter)`` pairs and returns a torch optimizer; under
    ZeRO they are flat pieces, which is right for optimizers that work element by element. weights: None takes the
    bundle's, a path takes safetensors by the model's names; without either, parameters are drawn from ``seed``, the
    same on every mesh. device: None takes CUDA where there is one. seed: also of dropout and noise, which are drawn
    from it and the number of steps before: the same run draws the same again, and goes on so from a checkpoint.

    A collective may take 300 seconds, or the environment's MESHWRIGHT_TIMEOUT. Where a rank fails it raises RankError
    naming the action and why, and the other ranks end within seconds.
    Raises PlanError for the wrong number of processes, BundleError for files that do not fit their manifest.
    """

    def __init__(
        self,
        bundle: str | Path,
        optimizer: Callable[[Named], torch.optim.Optimizer],
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
    ):
        self.directory = Path(bundle)
        self.manifest = load_manifest(self.directory)
        plan = self.manifest["plan"]
        self.groups = start(self.manifest["mesh"], plan["microbatches"], device)
        self.rank = self.groups.rank
        self.num_steps = 0
        self.seed = seed
        self._traced: list[Timed] | None = None
        self._watch = self.groups.wire.watch()
        with self._reporting("setting up"):
            for axis in self.manifest["mesh"]:
                self.groups.make([axis])
            self.placement = placement_of(self.manifest)
            for axes, holders in needed_groups(self.manifest, self.placement):
                self.groups.make(axes, holders)
            stages, actions = actions_of(self.directory, self.manifest, self.rank)
            self._declare(stages, weights)
            self.running = Running()
            if plan.get("compile", False):
                self._compile(any(action.kind == "I" for action in actions))
            held = list(self.declared.held.values())
            once = plan.get("reshard") == "step"
            self.units = make_units(held, plan["zero"], self.groups, self.module, once=once)
            self.frozen = gather_frozen(held, self.groups, self.module)
            self._uses = gather_in_modules(self.module, self.units, self.frozen, stay=once)
            self.executor = self._executor(stages)
            self.training, self.evaluation = self.executor.turns(actions), self.executor.turns(forwards(actions))
            pairs = [pair for unit in self.units for pair in unit.updates]
            # Torch's optimizers refuse an empty list, and a rank of a small model may have nothing to update.
            self.optimizer = optimizer(pairs or [("nothing", nn.Parameter(torch.empty(0, device=self.groups.device)))])

    def _declare(self, stages: Sequence[int], weights: str | Path | None) -> None:
        """Build the stages of this rank, whose files declare their parameters."""
        path = self.directory / "weights"
        own = Weights(path if path.exists() else None, self.seed)
        source = own if weights is None else Weights(Path(weights), self.seed, complete=True)
        self.declared = Declared(
            manifest=self.manifest, placement=self.placement, groups=self.groups, source=source, own=own
        )
        self.module = nn.ModuleDict()
        for stage in stages:
            made = stage_class(self.directory, self.manifest, stage)(Param(declared=self.declared, stage=stage))
            self.declared.check_complete(stage)
            self.module[f"stage_{stage}"] = made
        self.module.train()

    def _compile(self, splits: bool) -> None:
        from meshwright.runtime.compiled import CompiledBlocks  # loads torch's compilers, which takes seconds

        blocks = CompiledBlocks(groups=self.groups, running=self.running, splits=splits)
        for stage in self.module.values():
            blocks.compile(stage)

    def _executor(self, stages: Sequence[int]) -> Executor:
        links = Links(manifest=self.manifest, placement=self.placement, stages=stages, groups=self.groups)
        runs = {
            stage: StageRun(
                module=self.module[f"stage_{stage}"],
                index=stage,
                manifest=self.manifest,
                links=links,
                groups=self.groups,
                running=self.running,
            )
            for stage in stages
        }
        return Executor(
            stages=runs,
            links=links,
            groups=self.groups,
            before_backward=self._before_backward,
            after_backward=self._after_backward,
            entering=self._entering,
        )

    # A step

    def shard(self, batch: Batch) -> Batch:
        """This replica's part of a global batch: a contiguous piece of what is batched. Raises PlanError."""
        values = named(batch, self.manifest["inputs"])
        replicas, index = self.groups.size("dp"), self.groups.index("dp")
        part = replica_part(values, self.manifest["inputs"], index, replicas, self.groups.microbatches)
        return part if isinstance(batch, Mapping) else tuple(part.values())

    def step(self, part: Batch) -> torch.Tensor:
        """One training step on this replica's part of the batch; returns the loss of the whole batch (0-dim)."""
        loss = self.forward_backward(part)
        self.optimizer_step()
        return loss

    def forward_backward(self, part: Batch) -> torch.Tensor:
        """Gradients of a step, from zero; returns the loss of the whole batch (0-dim), the same on every rank."""
        with self._reporting("forward and backward", PlanError):
            for unit in self.units:
                unit.begin()
            loss, finish = self._run("training", part, self.training)
            for unit in self.units:
                unit.settle()
            for unit in self.units:
                unit.finish()
            finish()
            return loss

    def optimizer_step(self) -> None:
        """Update the parameters with the gradients that ``forward_backward`` left."""
        with self._reporting("the optimizer's step"):
            self.optimizer.step()
            self.update()
            self.num_steps += 1

    def update(self) -> None:
        """Tell the other ranks what this one changed of the parameters that it owns."""
        for unit in self.units:
            unit.begin_update()
        for unit in self.units:
            unit.finish()

    def evaluate(self, part: Batch) -> torch.Tensor:
        """The loss of the whole batch in eval mode, without gradients (0-dim), the same on every rank.

        Batch norms use their running statistics, dropout drops nothing, and no buffer is written.
        """
        with self._reporting("evaluation", PlanError), torch.no_grad():
            check_evaluation(self.manifest)
            self.module.eval()
            try:
                loss, finish = self._run("evaluation", part, self.evaluation)
                finish()
                return loss
            finally:
                self.module.train()

    def _run(self, kind: str, part: Batch, turns: Sequence[Turn]) -> tuple[torch.Tensor, Finish]:
        """Run actions; the loss is there after the finish."""
        inputs = self.manifest["inputs"]
        values = named(part, inputs)
        symbols = symbols_of(values, inputs, self.groups.size("dp"))
        stages = self.executor.stages
        wanted = {name for stage in stages for name in self.manifest["stages"][stage]["inputs"]}
        here = {
            n: v.to(self.groups.device) if isinstance(v, torch.Tensor) else v for n, v in values.items() if n in wanted
        }
        parts = microbatch_parts(here, inputs, self.groups.microbatches)
        self.declared.draws.seed, self.declared.draws.step = self.seed, self.num_steps
        self._uses.begin(kind)
        prepared = {index: stage.prepare(here) for index, stage in stages.items()}
        total = self.executor.run(turns, parts, prepared, symbols, kind == "training")
        self._uses.end()
        if self._traced is not None:
            self._traced += self.executor.timed
        return self._global_loss(total)

    def _global_loss(self, total: torch.Tensor | None) -> tuple[torch.Tensor, Finish]:
        """One sum over all ranks, in which every part of the loss counts once."""
        types, at = self.manifest["loss"]["types"], self.groups.coordinates
        counts = all(index == 0 or types.get(axis) == "P" for axis, index in at.items() if axis != "pp")
        loss = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        if total is not None and counts:
            loss += total
        if self._watch is None:
            return loss, lambda: None
        return loss, self.groups.wire.world.begin_all_reduce(loss)

    # Looking at everything

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients on every rank by the model's names. Raises RankError where equal replicas differ."""
        with self._reporting("gathering gradients"):
            entries = self.manifest["parameters"].items()
            names = [name for name, entry in entries if entry["stages"] and entry.get("trainable", True)]
            local = {
                (h.name, h.segment): g for unit in self.units for h, g in zip(unit.held, unit.full_grad(), strict=True)
            }
            return gathering.gather(self.manifest["parameters"], self.placement, self.groups, names, local, "gradient")

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Whole parameters and buffers on every rank, with the keys of ``model.state_dict()``."""
        with self._reporting("gathering parameters"):
            names = [name for name, entry in self.manifest["parameters"].items() if entry["stages"]]
            local = {key: h.parameter.detach() for key, h in self.declared.held.items()}
            for unit in self.units:
                local |= {(h.name, h.segment): v for h, v in zip(unit.held, unit.values(), strict=True)}
            for members, gathered in self.frozen:
                local |= {
                    (h.name, h.segment): v
                    for h, v in zip(members, gathered.values([h.piece.local_shape for h in members]), strict=True)
                }
            whole = gathering.gather(self.manifest["parameters"], self.placement, self.groups, names, local, "value")
            buffers = self.manifest["buffers"]
            names = [name for name, entry in buffers.items() if entry["stages"] and entry["persistent"]]
            local = {(name, None): buffer for name, buffer in self.declared.buffers.items()}
            whole |= gathering.gather(buffers, self.placement, self.groups, names, local, "value")
            return gathering.complete(self.manifest, whole, self.declared.source)

    def save(self, path: str | Path) -> None:
        """Save parameters, optimizer state, step count and seed, for the same layout."""
        with self._reporting("saving"):
            checkpoint.save(self, Path(path))

    def load(self, path: str | Path) -> None:
        """Continue from ``save``. Raises BundleError for another layout."""
        with self._reporting("loading", PlanError, BundleError):
            checkpoint.load(self, Path(path))

    def close(self) -> None:
        """Stop watching the other ranks, before the process group goes; a process that ends does so by itself."""
        if self._watch is not None:
            self._watch.stop()

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Write what all ranks compute inside, and what they wait for, as a trace for Perfetto and chrome://tracing.

        Rank 0 writes the file ``path`` at the end. ``meshwright timeline --trace`` writes the same of the simulated
        step, to be laid beside it. On CUDA every computation is waited for, so that its time is its own.

        >>> with trainer.trace("step.json"):
        ...     trainer.step(part)
        """
        executor, clock = self.executor, self.executor.clock
        executor.clock = clock_of(self.groups.device)
        self._traced = []
        try:
            with self._reporting("tracing"):
                self._everyone(None)  # so that all clocks begin together
            origin = executor.clock()
            yield
            with self._reporting("tracing"):
                slices = self._everyone(recording.slices(self.rank, self._traced, origin))
                levels = self._everyone(recording.levels(self.rank, self._traced, origin))
            if self.rank == 0:
                Path(path).write_text(chrome_trace(itertools.chain(*slices), itertools.chain(*levels)))
        finally:
            executor.clock, self._traced = clock, None

    def _everyone(self, value: Any) -> list[Any]:
        """Every rank's plain data, by rank."""
        return [value] if self._watch is None else self.groups.wire.world.gather_objects(value)

    # Inside

    def _entering(self, microbatch: int) -> None:
        self.groups.microbatch = microbatch

    def _before_backward(self, stage: int, kind: Kind, last: bool) -> None:
        if kind == "I":
            return
        for unit in self.units:
            if stage in unit.stages:
                unit.expect(last)
        if kind == "W":
            self._uses.hold(stage)

    def _after_backward(self, stage: int, kind: Kind, last: bool) -> None:
        if kind == "W":
            self._uses.let_go(stage)
        self._uses.end_backward(stage, last)

    @contextmanager
    def _reporting(self, doing: str, *everywhere: type[Exception]) -> Iterator[None]:
        """Collectives find this trainer's groups; a failure is told to the other ranks before it is raised.

        everywhere: errors that are not, because every rank raises them by itself and a script may go on after them.
        """
        with using(self.groups):
            try:
                yield
            except everywhere:
                raise
            except BaseException as error:
                known = isinstance(error, MeshwrightError) or not isinstance(error, Exception)
                text = f"rank {self.rank} failed in {doing}: {type(error).__name__}: {error}"
                if self._watch is not None:
                    self._watch.report(f"{type(error).__name__}: {error}" if known else text)
                if known:
                    raise
                raise RankError(text) from error
