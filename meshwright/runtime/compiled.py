"""The blocks of a stage through torch.compile, in whole backwards and in split ones.

A block is compiled once for all its instances: parameters are inputs of its graph. Hooks of modules (ZeRO-3 gathers in
them) stay outside, and so do random draws and written buffers, which break the graph of a block in two.

Where the schedule splits backwards, the backward graph of a block is taken apart: I computes the gradients of data, W
those of parameters from what I leaves. AOTAutograd gives the graph, inductor compiles both parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx_inner, partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from meshwright.runtime import buffers, collectives, random
from meshwright.runtime.deferred import Running
from meshwright.runtime.groups import Groups, using
from meshwright.runtime.ordered import put_in_order
from meshwright.runtime.splitting import Part, inputs_of, outputs_of, take_apart, weights_of
from meshwright.runtime.threads import Threads

Boxed = Callable[[list[Any]], Any]
"""Compiled code: takes its arguments in a list, which it empties."""

IN_GRAPHS = (
    collectives.invariant_to_replicated,
    collectives.replicated_to_partial,
    collectives.all_reduce,
    collectives.all_gather,
    collectives.reduce_scatter,
    collectives.shard,
    collectives.all_to_all,
    collectives.part_of_mean,
)
"""Calls that a graph keeps as they are until AOTAutograd traces through them."""

BETWEEN_GRAPHS = (
    collectives.shard_range,
    buffers.store,
    buffers.batch_norm,
    random.dropout,
    random.feature_dropout,
    random.alpha_dropout,
    random.feature_alpha_dropout,
    random.attention_with_dropout,
    random.rand_like,
    random.randn_like,
    random.rand,
    random.randn,
)
"""Calls that depend on more than their tensors: on the step, the site, the microbatch."""


@dataclass(slots=True, kw_only=True)
class CompiledBlocks:
    """Compiles the blocks of stages. splits: whether some of their backwards are split into I and W."""

    groups: Groups
    running: Running
    splits: bool
    backend: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.backend = self._compile  # one object: torch.compile compiles anew for another backend

    def compile(self, stage: nn.Module) -> None:
        """Compile the forward of every block: instances of the classes of the stage's file other than its own.

        On ranks that are threads of one process blocks stay as they are: torch.compile has state of which there is one
        in a process, and a rank that waits for another while it compiles would hold it.
        """
        if isinstance(self.groups.wire, Threads):
            return
        for function in IN_GRAPHS:
            torch.compiler.allow_in_graph(function)
        _keep_out_of_graphs(type(stage).forward.__globals__)
        for module in stage.modules():
            if module is not stage and type(module).__module__ == type(stage).__module__:
                compiled = torch.compile(module.forward, backend=self.backend, dynamic=True)
                module.forward = partial(_outside_of_modes, compiled)  # hooks of the module stay outside

    def _compile(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend of torch.compile: what its own does, but for order and parts."""
        graphs = _Graphs(
            groups=self.groups,
            running=self.running,
            held=[self.splits and isinstance(x, nn.Parameter) for x in inputs],
            tensors=[isinstance(x, torch.Tensor) for x in inputs],
        )
        make: Any = aot_autograd(
            fw_compiler=graphs.forward,
            bw_compiler=graphs.backward,
            inference_compiler=partial(graphs.forward, is_inference=True),
            partition_fn=partition_fn,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        with functorch_config.patch(donated_buffer=not any(graphs.held)):  # I must not overwrite what W needs
            return make(module, inputs)  # type: ignore[no-any-return]


@dataclass(slots=True, kw_only=True)
class _Graphs:
    """The graphs of a block. held: which inputs are parameters, of those in whose backward W is split off; tensors:
    which are tensors. weights: inputs of the backward graph that are parameters.
    """

    groups: Groups
    running: Running
    held: Sequence[bool]
    tensors: Sequence[bool]
    weights: set[str] = field(default_factory=set)

    def forward(self, module: fx.GraphModule, inputs: Sequence[Any], is_inference: bool = False) -> Boxed:
        if len(inputs) == len(self.held):
            self.weights = weights_of(module.graph, self.held)
        return self._with_groups(inductor(module, inputs, is_inference=is_inference))

    def backward(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Boxed:
        # As many gradients as inputs: else AOTAutograd has merged equal inputs, and nothing is split.
        alike = len(outputs_of(module.graph)) == len(self.held)
        parts = take_apart(module.graph, self.held, self.weights) if alike else None
        if parts is None:
            return self._with_groups(inductor(module, inputs, is_backward=True))
        codes = [
            inductor(fx.GraphModule(module, part.graph), inputs_of(part.graph), is_backward=True) for part in parts
        ]
        return _boxed(partial(self._run, parts, [self._with_groups(code) for code in codes]))

    def _with_groups(self, code: Boxed) -> Boxed:
        """Code whose communications find their groups: backwards may run on another thread."""

        def run(arguments: list[Any]) -> Any:
            with using(self.groups):
                return code(arguments)

        return _boxed(run)

    def _run(self, parts: tuple[Part, Part], codes: Sequence[Boxed], arguments: list[Any]) -> list[Any]:
        """The backward of one call of the block: I, and W unless that is deferred."""
        (first, second), (compute, compute_weights) = parts, codes
        taken = [arguments[at] for at in second.takes]
        own = [arguments[at] for at in first.takes]
        arguments.clear()
        found = compute(own)
        gradients: list[Any] = [None] * len(self.held)
        for at, gradient in zip(first.gives, found, strict=False):
            gradients[at] = gradient
        taken += found[len(first.gives) :]
        deferred = self.running.deferred
        if deferred is None:
            for at, gradient in zip(second.gives, compute_weights(taken), strict=True):
                gradients[at] = gradient
        else:
            edges: Any = torch._C._current_autograd_node().next_functions  # of tensors; for parameters, the leaves
            parameters = [edges[sum(self.tensors[:at])][0].variable for at in second.gives]
            with torch.enable_grad():
                left: torch.Tensor = _Weights.apply(partial(compute_weights, taken), *parameters)  # type: ignore[no-untyped-call]
            deferred.put_off([get_gradient_edge(left)], (torch.zeros_like(left),))
        return gradients


class _Weights(torch.autograd.Function):
    """W of one call of a block, as a node of autograd before its parameters: other nodes may lead to them too."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Sequence[torch.Tensor]], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.compute = compute
        return parameters[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        compute, ctx.compute = ctx.compute, None
        return None, *compute()


def inductor(module: fx.GraphModule, inputs: Sequence[Any], **kind: Any) -> Boxed:
    """A graph of AOTAutograd as code."""
    put_in_order(module.graph)
    module.recompile()
    (output,) = module.graph.find_nodes(op="output")
    # Strides stay as eager ones: the code around a block may rely on them.
    output.meta["user_visible_output_idxs"] = [k for k, n in enumerate(output.args[0]) if isinstance(n, fx.Node)]
    with V.set_fake_mode(detect_fake_mode(inputs)):
        return compile_fx_inner(module, inputs, **kind)


def _boxed(function: Boxed) -> Boxed:
    """Marked as one that takes a list and empties it."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def _outside_of_modes(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a block so that modes do not see, and torch.compile does not trace, what they do in eager operators."""
    if not torch._C._len_torch_function_stack():
        return compiled(*args, **kwargs)
    with torch.overrides._pop_mode_temporarily():
        return _outside_of_modes(compiled, *args, **kwargs)


def _keep_out_of_graphs(names: dict[str, Any]) -> None:
    """In the names of a stage's file, make functions of ``BETWEEN_GRAPHS`` such that torch.compile does not trace."""
    for name, value in names.items():
        if any(value is function for function in BETWEEN_GRAPHS):
            names[name] = torch.compiler.disable(value)
        elif value is collectives.shard:
            names[name] = _shard


_shard_between_graphs = torch.compiler.disable(collectives.shard)


def _shard(x: torch.Tensor, axis: str, **how: Any) -> torch.Tensor:
    """``shard``: a graph does not know which microbatch it computes."""
    return (_shard_between_graphs if axis == "mb" else collectives.shard)(x, axis, **how)
