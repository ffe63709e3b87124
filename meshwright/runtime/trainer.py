"""The Trainer: what a user's script holds on a rank."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshwright.runtime import checkpoint, gathering
from meshwright.runtime.errors import MeshwrightError, PlanError, RankError
from meshwright.runtime.executor import Executor, symbols_of
from meshwright.runtime.failure import Watch
from meshwright.runtime.groups import start, using
from meshwright.runtime.manifest import actions_of, load_manifest, stage_class
from meshwright.runtime.parameters import Declared, Param, Weights
from meshwright.runtime.units import Unit, make_units, needed_groups

Batch = Mapping[str, Any] | Sequence[Any]
Named = list[tuple[str, nn.Parameter]]


class Trainer:
    """Trains a bundle on this rank.

    bundle: its directory. optimizer: gets this rank's ``(name, parameter)`` pairs (pieces of them under ZeRO),
    returns a
    torch optimizer. weights: None takes the bundle's, a path a checkpoint of safetensors; without either the
    parameters are
    drawn from ``seed``, the same on every mesh. device: None takes CUDA where there is one.
    Raises PlanError for the wrong number of processes, BundleError for files that do not fit.
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
        self._watch = Watch(self.rank) if dist.is_initialized() and dist.get_world_size() > 1 else None
        with self._guarded("setting up"):
            for axis in self.manifest["mesh"]:
                self.groups.make([axis])
            for axes, stages in needed_groups(self.manifest):
                self.groups.make(axes, stages)
            self.index, self.actions = actions_of(self.directory, self.manifest, self.rank)
            own = self.directory / "weights"
            source = (
                Weights(Path(weights), seed, True)
                if weights is not None
                else Weights(own if own.exists() else None, seed)
            )
            self.declared = Declared(manifest=self.manifest, groups=self.groups, source=source)
            self.module: nn.Module = stage_class(self.directory, self.manifest, self.index)(
                Param(declared=self.declared)
            )
            self.module.train()
            self.units: list[Unit] = make_units(self.declared.held, plan["zero"], self.groups)
            self._gather_around_modules()
            self.executor = Executor(
                stage=self.module,
                index=self.index,
                manifest=self.manifest,
                groups=self.groups,
                before_backward=self._expect,
            )
            pairs = [pair for unit in self.units for pair in unit.pieces]
            # torch's optimizers refuse an empty list; a rank may hold no piece of a model with few parameters.
            self.optimizer = optimizer(pairs or [("nothing", nn.Parameter(torch.zeros(0, device=self.groups.device)))])

    # A step

    def shard(self, batch: Batch) -> Batch:
        """This replica's part of a global batch: a contiguous piece of dim 0 of every batched tensor."""
        pieces, index = self.groups.size("dp"), self.groups.coordinates.get("dp", 0)

        def cut(name: str, value: Any) -> Any:
            if "dp" not in self.manifest["inputs"][name]["types"]:
                return value
            if value.shape[0] % (pieces * self.groups.microbatches):
                raise PlanError(
                    f"cannot cut the batch of {value.shape[0]} ({name!r}, dim 0) over dp={pieces} times "
                    f"{self.groups.microbatches} microbatches\n  use a multiple of {pieces * self.groups.microbatches}"
                )
            size = value.shape[0] // pieces
            return value[index * size : (index + 1) * size]

        named = {name: cut(name, value) for name, value in self._named(batch).items()}
        return named if isinstance(batch, Mapping) else tuple(named.values())

    def step(self, part: Batch) -> torch.Tensor:
        """One training step on this replica's part of the batch; returns the loss of the whole batch (0-dim)."""
        loss = self.forward_backward(part)
        self.optimizer_step()
        return loss

    def forward_backward(self, part: Batch) -> torch.Tensor:
        """Gradients of a step, from zero; returns the loss of the whole batch (0-dim), the same on every rank."""
        with self._guarded("forward and backward"):
            for unit in self.units:
                unit.begin()
            loss = self._run(part, self.actions, grad=True)
            for unit in self.units:
                unit.finish()
            return loss

    def optimizer_step(self) -> None:
        """Update the parameters with the gradients that ``forward_backward`` left."""
        with self._guarded("the optimizer step"):
            self.optimizer.step()
            for work in [work for unit in self.units if (work := unit.updated()) is not None]:
                work.wait()
            self.num_steps += 1

    def evaluate(self, part: Batch) -> torch.Tensor:
        """The loss of the whole batch in eval mode, without gradients (0-dim)."""
        with self._guarded("evaluation"), torch.no_grad():
            self.module.eval()
            try:
                forwards = [a for a in self.actions if a.kind == "F"]
                return self._run(part, sorted(forwards, key=lambda a: a.microbatch), grad=False)
            finally:
                self.module.train()

    def _run(self, part: Batch, actions: Sequence[Any], grad: bool) -> torch.Tensor:
        named = self._named(part)
        inputs = self.manifest["inputs"]
        sizes = {**self.groups.sizes, "mb": self.groups.microbatches}
        symbols = symbols_of(inputs, named, sizes)
        wanted = self.manifest["stages"][self.index]["inputs"]
        whole = {
            n: v.to(self.groups.device) if isinstance(v, torch.Tensor) else v for n, v in named.items() if n in wanted
        }
        prepared = self._prepared(whole)
        total = self.executor.run(actions, self._microbatches(whole), prepared, symbols, grad)
        return self._global_loss(total)

    def _prepared(self, whole: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        names = self.manifest["stages"][self.index]["prepares"]
        if not names:
            return {}
        function: Any = self.module.prepare
        arguments = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        with torch.no_grad():
            result = function(**{name: whole[name] for name in arguments})
        return dict(zip(names, result if isinstance(result, tuple) else (result,), strict=True))

    def _microbatches(self, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
        count = self.groups.microbatches

        def cut(name: str, value: Any, k: int) -> Any:
            if (
                "mb" not in self.manifest["inputs"][name]["types"]
                and "dp" not in self.manifest["inputs"][name]["types"]
            ):
                return value
            if value.shape[0] % count:
                raise PlanError(f"cannot cut the part of {value.shape[0]} ({name!r}, dim 0) in {count} microbatches")
            size = value.shape[0] // count
            return value[k * size : (k + 1) * size]

        return [{name: cut(name, value, k) for name, value in whole.items()} for k in range(count)]

    def _global_loss(self, total: torch.Tensor) -> torch.Tensor:
        """One sum over all ranks, in which every part of the loss counts once."""
        loss = self.manifest["loss"]
        at = self.groups.coordinates
        counts = self.index == loss["stage"] and all(at[a] == 0 or loss["types"].get(a) == "P" for a in at if a != "pp")
        if loss["types"].get("mb", "P") != "P":
            total = total / self.groups.microbatches
        total = total.double() if counts else torch.zeros((), dtype=torch.float64, device=total.device)
        if self._watch is not None:
            dist.all_reduce(total)
        return total

    def _named(self, batch: Batch) -> dict[str, Any]:
        inputs = self.manifest["inputs"]
        if isinstance(batch, Mapping):
            if set(batch) != set(inputs):
                raise PlanError(f"the batch has {', '.join(batch)}; the program was compiled for {', '.join(inputs)}")
            return dict(batch)
        if len(batch) != len(inputs):
            raise PlanError(f"the batch has {len(batch)} values; the program was compiled for {', '.join(inputs)}")
        return dict(zip(inputs, batch, strict=True))

    # Looking at everything

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients on every rank by the model's names; raises RankError where replicas that must agree
        differ.
        """
        with self._guarded("gathering gradients"):
            local = {id(h): g for unit in self.units for h, g in zip(unit.held, unit.full_grad(), strict=True)}
            return gathering.gather(self.manifest, self.groups, self.declared.held, local, "gradient")

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Whole parameters and buffers on every rank, with the keys of ``model.state_dict()``."""
        with self._guarded("gathering parameters"):
            local = {id(h): v for unit in self.units for h, v in zip(unit.held, unit.values(), strict=True)}
            local |= {id(h): h.parameter.detach() for h in self.declared.held if not h.trainable}
            whole = gathering.gather(self.manifest, self.groups, self.declared.held, local, "value")
            whole |= gathering.gather_buffers(self.manifest, self.groups, self.declared.buffers)
            return gathering.complete(self.manifest, whole, self.declared.source)

    def save(self, path: str | Path) -> None:
        """Save parameters, optimizer state and step with torch.distributed.checkpoint, for the same layout."""
        with self._guarded("saving"):
            checkpoint.save(self, Path(path))

    def load(self, path: str | Path) -> None:
        """Continue from ``save``. Raises BundleError for another layout."""
        with self._guarded("loading"):
            checkpoint.load(self, Path(path))

    def close(self) -> None:
        """Stop watching the other ranks: the process group may go. Optional at the end of a process."""
        if self._watch is not None:
            self._watch.stop()

    # Inside

    def _expect(self, last: bool) -> None:
        for unit in self.units:
            unit.expect(last)

    def _gather_around_modules(self) -> None:
        """ZeRO-3: parameters become whole before a module's forward and backward, and are freed after them."""
        by_parameter = {id(h.parameter): unit for unit in self.units if unit.zero == 3 for h in unit.held}
        for module in self.module.modules():
            units = list(
                dict.fromkeys(by_parameter[id(p)] for p in module.parameters(recurse=False) if id(p) in by_parameter)
            )
            if units:
                module.register_forward_pre_hook(lambda _m, _a, u=tuple(units): _each(u, "gather"))
                module.register_forward_hook(lambda _m, _a, out, u=tuple(units): _after_forward(u, out))

    def _guarded(self, doing: str) -> "_Guard":
        return _Guard(self, doing)


class _Guard:
    """Collectives find this trainer's groups; a failure is told to the other ranks before it is raised."""

    def __init__(self, trainer: Trainer, doing: str):
        self.trainer, self.doing = trainer, doing
        self.context = using(trainer.groups)

    def __enter__(self) -> None:
        self.context.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.context.__exit__(None, None, None)
        if error is None or isinstance(error, PlanError):
            return
        watch = self.trainer._watch
        if watch is not None:
            watch.announce(f"{type(error).__name__}: {error}")
        if isinstance(error, Exception) and not isinstance(error, MeshwrightError):
            raise RankError(
                f"rank {self.trainer.rank} failed in {self.doing}: {type(error).__name__}: {error}"
            ) from error


def _each(units: Iterable[Unit], what: str) -> None:
    for unit in units:
        getattr(unit, what)()


def _after_forward(units: tuple[Unit, ...], out: Any) -> None:
    _each(units, "drop")
    for tensor in out if isinstance(out, tuple) else (out,):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda grad: _each(units, "gather"))
