"""Names, sections and aliases read from the user's source, on real models and on odd source."""

import ast
import importlib.util
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from meshwright.compiler.capture import capture
from meshwright.compiler.frames import Frame, frames, keep_all_frames, module_stack
from meshwright.compiler.names import Origin, formal_name, free_name, origins
from meshwright.compiler.sources import Sources

aten = torch.ops.aten
LLAMA = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0,
                  attn_pdrop=0)  # fmt: skip
FALCON = FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)


def loss_of(result: Any) -> torch.Tensor:
    loss: torch.Tensor = result if isinstance(result, torch.Tensor) else result.loss
    return loss


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        return loss_of(self.model(*args, **batch))


def graph_of(model: nn.Module, *args: torch.Tensor, **batch: torch.Tensor) -> fx.Graph:
    """The captured graph with no-grad regions inlined and no-op casts dropped, as normalization does."""
    with keep_all_frames():
        module = torch.export.export(Wrapper(model), args, batch, strict=False).graph_module
    graph: fx.Graph = module.graph
    for node in list(graph.nodes):
        if "set_grad" in str(node.target):
            body = getattr(module, str(node.args[1].target)).graph
            placeholders = [inner for inner in body.nodes if inner.op == "placeholder"]
            with graph.inserting_before(node):
                results = graph.graph_copy(body, dict(zip(placeholders, node.args[2:], strict=True)))
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
                graph.erase_node(user)
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        is_cast = node.target in (aten.to.dtype, aten.to.dtype_layout, aten.dropout.default, aten.contiguous.default)
        if is_cast and source is not None and source.meta["val"].dtype == node.meta["val"].dtype:
            node.replace_all_uses_with(source)
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    return graph


def rows_of(graph: fx.Graph) -> list[tuple[fx.Node, Origin]]:
    return [(node, origin) for node, origin in origins(graph).items() if node.op == "call_function"]


@pytest.fixture(scope="module")
def llama() -> fx.Graph:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return graph_of(LlamaForCausalLM(LLAMA), input_ids=ids, labels=ids.clone())


@pytest.fixture(scope="module")
def gpt2() -> fx.Graph:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return graph_of(GPT2LMHeadModel(GPT2), input_ids=ids, labels=ids.clone())


@pytest.fixture(scope="module")
def falcon() -> fx.Graph:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return graph_of(FalconForCausalLM(FALCON), input_ids=ids, labels=ids.clone())


def in_module(graph: fx.Graph, path: str, *operators: object) -> list[Origin]:
    """The origins of the operators (all, if none is named) inside one module."""
    return [
        origin
        for node, origin in rows_of(graph)
        if any(p == path for p, _ in module_stack(node)) and (not operators or node.target in operators)
    ]


def names(found: list[Origin]) -> list[str]:
    return [origin.name for origin in found]


# Frames


def test_frames_of_helpers_are_kept_and_those_of_torch_are_not(llama: fx.Graph) -> None:
    cat = next(node for node in llama.nodes if "rotate_half" in [frame.function for frame in frames(node)])
    functions = [frame.function for frame in frames(cat)]
    assert functions[-3:] == ["forward", "apply_rotary_pos_emb", "rotate_half"]
    assert not any("/torch/" in frame.file for node in llama.nodes for frame in frames(node))


def test_frames_know_columns_and_modules(llama: fx.Graph) -> None:
    linear = next(node for node in llama.nodes if node.target is aten.linear.default)
    *_, block, attention = frames(linear)
    line = linecache.getline(attention.file, attention.line)
    assert attention.span is not None
    assert line[attention.span[1] : attention.span[3]] == "self.q_proj(hidden_states)"
    assert (attention.modules_inside, block.modules_inside) == (1, 2)


def test_module_stack_is_relative_to_the_model(llama: fx.Graph) -> None:
    linear = next(node for node in llama.nodes if node.target is aten.linear.default)
    assert [path for path, _ in module_stack(linear)] == [
        "", "model", "model.layers.0", "model.layers.0.self_attn", "model.layers.0.self_attn.q_proj",
    ]  # fmt: skip
    assert [name for _, name in module_stack(linear)][2:4] == ["LlamaDecoderLayer", "LlamaAttention"]
    assert module_stack(linear, prefix="")[2][0] == "model.model"


def test_the_tracer_is_as_before_after_the_context() -> None:
    before = fx.proxy.TracerBase._filter_traceback_frames
    with pytest.raises(KeyError), keep_all_frames():
        assert fx.proxy.TracerBase._filter_traceback_frames is not before
        raise KeyError
    assert fx.proxy.TracerBase._filter_traceback_frames is before


def test_frames_of_a_plain_trace_are_read_too() -> None:
    node = fx.Graph().placeholder("x")
    assert frames(node) == ()
    node.meta["stack_trace"] = '  File "/a b/c.py", line 3, in forward\n    return x + 1'
    assert frames(node) == (Frame(file="/a b/c.py", line=3, function="forward"),)


# Llama


def test_llama_attention(llama: fx.Graph) -> None:
    attention = "model.layers.0.self_attn"
    linears = in_module(llama, attention, aten.linear.default)
    assert names(linears) == ["query_states", "key_states", "value_states", "attn_output"]
    assert all(origin.is_name_of_statement for origin in linears)
    assert names(in_module(llama, attention, aten.scaled_dot_product_attention.default)) == ["attn_output"]
    *rotated, cached_key, cached_value = in_module(llama, attention, aten.cat.default)
    assert names(rotated) == ["rotate_half", "rotate_half"]
    assert (cached_key.name, cached_value.name) == ("key_states", "value_states")
    assert not any(origin.is_name_of_statement for origin in rotated)
    assert names(in_module(llama, attention, aten.add.Tensor)) == ["query_states", "key_states"]
    assert names(in_module(llama, attention, aten.mul.Tensor)) == ["query_states"] * 2 + ["key_states"] * 2
    assert {origin.section for origin in in_module(llama, attention)} == {"self_attn"}
    assert {"key", "value", "cos", "sin"} <= set(names(in_module(llama, attention)))


def test_llama_mlp(llama: fx.Graph) -> None:
    gate, up, down = in_module(llama, "model.layers.1.mlp", aten.linear.default)
    assert [gate.name, up.name, down.name] == ["gate_proj", "up_proj", "down_proj"]
    assert [gate.is_name_of_statement, up.is_name_of_statement, down.is_name_of_statement] == [False, False, True]
    (silu,) = in_module(llama, "model.layers.1.mlp", aten.silu.default)
    assert (silu.name, silu.is_name_of_statement) == ("act_fn", False)
    assert {origin.section for origin in in_module(llama, "model.layers.1.mlp")} == {"mlp"}


def test_llama_norm(llama: fx.Graph) -> None:
    norm = in_module(llama, "model.layers.0.input_layernorm")
    assert norm[-1].name == "hidden_states"
    (variance,) = in_module(llama, "model.layers.0.input_layernorm", aten.mean.dim)
    assert (variance.name, variance.is_name_of_statement, variance.aliases) == ("variance", True, ())
    (power,) = in_module(llama, "model.layers.0.input_layernorm", aten.pow.Tensor_Scalar)
    assert not power.is_name_of_statement
    assert {origin.section for origin in norm} == {"input_layernorm"}
    file, line = norm[0].outer
    assert linecache.getline(file, line).strip() == "hidden_states = self.input_layernorm(hidden_states)"
    file, line = norm[-1].statement
    assert linecache.getline(file, line).strip() == "return self.weight * hidden_states.to(input_dtype)"


def test_llama_residuals(llama: fx.Graph) -> None:
    residuals = [o for node, o in rows_of(llama) if module_stack(node)[-1][0] == "model.layers.0"]
    assert names(residuals) == ["hidden_states", "hidden_states"]
    assert [origin.aliases for origin in residuals] == [("residual",), ("residual",)]
    assert {origin.section for origin in residuals} == {""}


def test_llama_outside_of_the_blocks(llama: fx.Graph) -> None:
    (embedding,) = in_module(llama, "model.embed_tokens")
    assert (embedding.name, embedding.section) == ("inputs_embeds", "embed_tokens")
    assert set(embedding.aliases) == {"hidden_states", "residual"}
    rotary = in_module(llama, "model.rotary_emb")
    assert {"freqs", "emb", "cos", "sin"} <= set(names(rotary))
    assert {origin.section for origin in rotary} == {"rotary_emb"}
    (logits,) = in_module(llama, "lm_head")
    assert (logits.name, logits.section) == ("logits", "lm_head")
    mask = [o for _, o in rows_of(llama) if o.statement[0].endswith("masking_utils.py")]
    assert mask and {origin.section for origin in mask} == {"causal_mask"}
    assert "position_ids" in [o.name for _, o in rows_of(llama) if not o.section]


def test_llama_loss(llama: fx.Graph) -> None:
    found = [o for _, o in rows_of(llama) if o.statement[0].endswith("loss_utils.py")]
    assert [(o.name, o.section) for o in found] == [
        ("labels", "loss_function"), ("shift_labels", "loss_function"), ("logits", "loss_function"),
        ("shift_labels", "loss_function"), ("loss", "cross_entropy"),
    ]  # fmt: skip


def test_formal_arguments_of_a_block(llama: fx.Graph) -> None:
    outside = ("embed_tokens", "rotary_emb")
    nodes = {origin.name: node for node, origin in rows_of(llama) if origin.section in outside}
    assert formal_name(nodes["inputs_embeds"], nodes["inputs_embeds"].users, "model.layers.0") == "hidden_states"
    assert formal_name(nodes["cos"], nodes["cos"].users, "model.layers.1") == "cos"
    assert formal_name(nodes["cos"], nodes["cos"].users, "model.norm") is None


def test_statement_around_a_decorated_forward(llama: fx.Graph) -> None:
    (first, *_) = in_module(llama, "model.layers.0.self_attn.q_proj")
    file, line = first.outer
    assert linecache.getline(file, line).strip() == "hidden_states, _ = self.self_attn("


# GPT-2 and Falcon


def test_gpt2(gpt2: fx.Graph) -> None:
    attention = in_module(gpt2, "transformer.h.0.attn")
    assert {"query_states", "key_states", "value_states", "attn_output"} <= set(names(attention))
    assert names(in_module(gpt2, "transformer.h.0.attn", aten.addmm.default)) == ["c_attn", "attn_output"]
    assert names(in_module(gpt2, "transformer.h.0.mlp", aten.addmm.default)) == ["hidden_states", "hidden_states"]
    (tanh,) = in_module(gpt2, "transformer.h.0.mlp", aten.tanh.default)
    assert (tanh.name, tanh.is_name_of_statement) == ("tanh", False)
    assert {o.section for o in in_module(gpt2, "transformer.h.1")} == {"ln_1", "attn", "ln_2", "mlp", ""}
    embeddings = [o for node, o in rows_of(gpt2) if node.target is aten.embedding.default]
    assert [(o.name, o.section) for o in embeddings] == [("inputs_embeds", "wte"), ("position_embeds", "wpe")]
    residual = next(o for node, o in rows_of(gpt2) if node.target is aten.add.Tensor and "residual" in o.aliases)
    assert residual.name == "hidden_states"


def test_operators_that_normalization_cuts_in_pieces() -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    function = capture(GPT2LMHeadModel(GPT2), {"input_ids": ids, "labels": ids.clone()}).function
    found = [(node.target, origin.name) for node, origin in function.origins.items() if node.op == "call_function"]
    attention = [name for target, name in found if target in (aten.matmul.default, aten.add.Tensor)][1:5]
    assert attention == ["c_attn", "c_attn", "attn_output", "attn_output"]
    assert [name for _, name in found][-4:] == ["loss", "loss", "num_valid", "loss"]


def test_falcon(falcon: fx.Graph) -> None:
    attention = in_module(falcon, "transformer.h.0.self_attention")
    found = set(names(attention))
    assert {"fused_qkv", "query_layer", "key_layer", "value_layer", "rotate_half", "attn_output"} <= found
    products = in_module(falcon, "transformer.h.0", aten.matmul.default)
    assert names(products) == ["fused_qkv", "attn_output", "dense_h_to_4h", "mlp_output"]
    (norm,) = in_module(falcon, "transformer.h.0.input_layernorm")
    assert (norm.name, norm.aliases) == ("attention_layernorm_out", ("mlp_layernorm_out",))
    (result,) = [o for o in in_module(falcon, "transformer.h.0", aten.add.Tensor) if o.section == "dropout_add"]
    assert (result.name, result.aliases) == ("hidden_states", ("residual",))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_no_name_is_a_number_of_the_graph(family: str, request: pytest.FixtureRequest) -> None:
    graph = request.getfixturevalue(family)
    for node, origin in rows_of(graph):
        assert origin.name.isidentifier()
        assert origin.name == free_name(origin.name)
        assert origin.name != node.name or not node.name[-1].isdigit()
        assert origin.statement[1] > 0


# Source of all kinds


Write = Callable[[str], ModuleType]

HEADER = """
import torch
import torch.nn.functional as F
from dataclasses import dataclass
from torch import nn

@dataclass
class Output:
    loss: torch.Tensor
    state: torch.Tensor
"""


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a file with a class ``Model`` and imports it."""
    modules: list[str] = []

    def import_(source: str) -> ModuleType:
        path = tmp_path / f"user_{len(modules)}.py"
        path.write_text(HEADER + textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        modules.append(path.stem)
        spec.loader.exec_module(module)
        return module

    yield import_
    for name in modules:
        del sys.modules[name]


def named(module: ModuleType, *, size: int = 8) -> dict[str, str]:
    """By operator, the names of the values of ``Model()``, those of parts in parentheses."""
    graph = graph_of(module.Model(), torch.ones(2, size))
    found: dict[str, list[str]] = {}
    for node, origin in rows_of(graph):
        target = getattr(node.target, "__name__", "").split(".")[0]
        found.setdefault(target, []).append(origin.name if origin.is_name_of_statement else f"({origin.name})")
    return {target: " ".join(values) for target, values in found.items()}


STATEMENTS = {
    "annotated": ("y: torch.Tensor = x.exp()\nreturn y.sum()", {"exp": "y", "sum": "(sum_)"}),
    "augmented": ("total = x.exp()\ntotal += x\nreturn total.sum()", {"add_": "total"}),
    "walrus": ("if (grown := x.exp()) is not None:\n    return (grown * 2).sum()", {"exp": "grown"}),
    "several lines": (
        "grown = (\n    x\n    .exp()\n    .transpose(0, 1)\n)\n"
        "shrunk = torch.log(\n    grown,\n)\nreturn shrunk.sum()",
        {"exp": "grown", "transpose": "grown", "log": "shrunk"},
    ),
    "tuple of values": ("a1, b1 = x.exp(), x.sin()\nreturn (a1 * b1).sum()", {"exp": "a1", "sin": "b1"}),
    "split": ("left, right = x.split(4, dim=1)\nreturn (left * right).sum()", {"getitem": "left right"}),
    "split, then taken": ("parts = x.split(4, dim=1)\nleft = parts[0]\nreturn (left * parts[1]).sum()",
                          {"split": "parts", "getitem": "left (x)"}),
    "attribute": ("self.cache = x.exp()\nreturn self.cache.sum()", {"exp": "cache"}),
    "key": ("d = {}\nd['grown'] = x.exp()\nreturn d['grown'].sum()", {"exp": "grown"}),
    "dict": ("d = {'grown': x.exp(), 'other': x.sin()}\nreturn (d['grown'] * d['other']).sum()",
             {"exp": "grown", "sin": "other"}),
    "fields": ("out = Output(loss=x.exp(), state=x.sin())\nreturn (out.loss * out.state).sum()",
               {"exp": "loss", "sin": "state"}),
    "underscore": ("_, kept = x.exp(), x.sin()\nreturn (kept * _).sum()", {"exp": "(exp)", "sin": "kept"}),
    "conditional": ("y = x.exp() if x is not None else x\nreturn y.sum()", {"exp": "y"}),
    "builtin": ("max = x.exp()\ninput = max.sin()\nreturn (input * max).sum()", {"exp": "max_", "sin": "input_"}),
    "part called": ("y = torch.log(torch.exp(x) + 1)\nreturn y.sum()", {"exp": "(exp)", "add": "(y)", "log": "y"}),
    "part viewed": ("y = torch.log(x.exp().view(-1))\nreturn y.sum()", {"exp": "(y)", "log": "y"}),
    "method chain": ("y = x.exp().mean(-1)\nreturn y.sum()", {"exp": "(y)", "mean": "y"}),
    "loop": ("for i in range(2):\n    x = x.exp() * 2\nreturn x.sum()", {"exp": "(x) (x)", "mul": "x x"}),
    "comprehension": ("parts = [p.exp() for p in x.split(4, dim=1)]\nreturn torch.cat(parts).sum()",
                      {"exp": "parts parts"}),
    "comprehension inside": ("y = torch.cat([p.exp() for p in x.split(4, dim=1)])\nreturn y.sum()",
                             {"exp": "(y) (y)", "cat": "y"}),
    "lambda": ("double = lambda v: v.exp()\ngrown = double(x)\nreturn grown.sum()", {"exp": "grown"}),
    "if": ("if x.exp().shape[0]:\n    return (x.exp() + 1).sum()\n", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", STATEMENTS)
def test_statements(case: str, write: Write) -> None:
    body, expected = STATEMENTS[case]
    source = "class Model(nn.Module):\n    def forward(self, x):\n" + textwrap.indent(body, " " * 8)
    found = named(write(source))
    assert {target: found.get(target) for target in expected} == expected


FUNCTIONS = {
    "numbers agree": (
        "def helper(q, k):\n    q_embed = q.exp()\n    k_embed = k.sin()\n    return q_embed, k_embed",
        "query, key = helper(x, x)\nreturn (query * key).sum()",
        {"exp": "query", "sin": "key"},
    ),
    "numbers disagree": (
        "def helper(q, k):\n    q_embed = q.exp()\n    k_embed = k.sin()\n    return q_embed, k_embed",
        "both = helper(x, x)\nreturn (both[0] * both[1]).sum()",
        {"exp": "q_embed", "sin": "k_embed"},
    ),
    "return of a call of a helper": (
        "def inner(q):\n    return q.exp()\n\ndef helper(q):\n    return inner(q)",
        "grown = helper(x)\nreturn grown.sum()",
        {"exp": "grown"},
    ),
    "helper inside an expression": (
        "def helper(q):\n    return torch.cat((-q, q))",
        "grown = helper(x) * 2\nreturn grown.sum()",
        {"cat": "(helper)", "neg": "(helper)", "mul": "grown"},
    ),
    "used inside too": (
        "def helper(q):\n    big = q.exp()\n    small = big.sin()\n    return big",
        "grown = helper(x)\nreturn grown.sum()",
        {"exp": "grown"},
    ),
    "read again inside": (
        "def helper(q):\n    big = q.exp()\n    return big, big.sin()",
        "grown, other = helper(x)\nreturn (grown * other).sum()",
        {"exp": "big", "sin": "other"},
    ),
    "only views follow": (
        "def helper(q):\n    q = q.exp()\n    q = q.view(-1)\n    return q",
        "grown = helper(x)\nreturn grown.sum()",
        {"exp": "grown", "view": "grown"},
    ),
    "two parts of one value": (
        "def helper(q):\n    both = q.exp()\n    return both[0], both[1]",
        "first, second = helper(x)\nreturn (first * second).sum()",
        {"exp": "both", "select": "first second"},
    ),
    "decorator": (
        "def decorate(f):\n    def wrapper(*args, **kwargs):\n        result = f(*args, **kwargs)\n"
        "        return result\n    return wrapper\n\n@decorate\ndef helper(q):\n    return q.exp()",
        "grown = helper(x)\nreturn grown.sum()",
        {"exp": "grown"},
    ),
    "called twice": (
        "def helper(q):\n    return q.exp() * q",
        "first = helper(x)\nsecond = helper(first)\nreturn second.sum()",
        {"exp": "(first) (second)", "mul": "first second"},
    ),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions(case: str, write: Write) -> None:
    helper, body, expected = FUNCTIONS[case]
    source = f"{helper}\n\nclass Model(nn.Module):\n    def forward(self, x):\n" + textwrap.indent(body, " " * 8)
    found = named(write(source))
    assert {target: found.get(target) for target in expected} == expected


MLP = """
class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)
        self.tail = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        grown = self.up(x)
        x = self.down(grown.relu())
        return x

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Inner() for _ in range(2))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        for layer in self.layers:
            residual = x
            x = layer(x) + residual
        score = self.head(x)
        return score.sum()
"""


def test_modules_keep_their_names_unless_they_say_nothing(write: Write) -> None:
    found = named(write(MLP))
    assert found["linear"] == "grown layer grown layer score"
    assert found["relu"] == "(layer) (layer) score"


def test_sections_of_plain_modules(write: Write) -> None:
    graph = graph_of(write(MLP).Model(), torch.ones(2, 8))
    sections = [origin.section for _, origin in rows_of(graph)]
    assert sections == ["up", "", "down", "", "up", "", "down", "", "head", "head", ""]
    sums = [o for node, o in rows_of(graph) if node.target is aten.add.Tensor]
    assert sums[0].aliases == ("residual",)


def test_names_without_source_come_from_modules_and_operators() -> None:
    space: dict[str, Any] = {"__name__": "user"}
    exec("import torch\nfrom torch import nn\n" + MLP, space)
    graph = graph_of(space["Model"](), torch.ones(2, 8))
    expected = ["up", "relu", "down", "add"] * 2 + ["linear", "relu", "sum_"]
    assert names([origin for _, origin in rows_of(graph)]) == expected
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
    assert names([origin for _, origin in rows_of(graph)]) == expected


def test_names_without_columns_are_those_of_the_statements(write: Write) -> None:
    source = "class Model(nn.Module):\n    def forward(self, x):\n        grown = x.exp()\n        return grown.sum()\n"
    graph = graph_of(write(source).Model(), torch.ones(2, 8))
    for node in graph.nodes:
        trace = node.meta.get("stack_trace")
        node.meta["stack_trace"] = "\n".join(line.split("  # ")[0] for line in trace.splitlines()) if trace else None
    assert names([origin for _, origin in rows_of(graph)])[0] == "grown"


CHANGES: list[Callable[[str], str]] = [lambda s: "", lambda s: s[::-1], lambda s: s[7:], lambda s: "\n" + s, str.upper]


@pytest.mark.parametrize("change", CHANGES)
def test_source_that_changed_after_the_import_never_raises(change: Callable[[str], str], write: Write) -> None:
    module = write(MLP)
    graph = graph_of(module.Model(), torch.ones(2, 8))
    path = Path(str(module.__file__))
    text = change(path.read_text())
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    assert all(origin.name.isidentifier() for origin in origins(graph).values())


def test_method_calls_over_several_lines_may_begin_at_the_method(write: Write) -> None:
    module = write("y = (\n    x\n    .exp()\n    .log()\n) if (x := torch.ones(2)) is not None else None\n")
    lines = Path(str(module.__file__)).read_text().splitlines()
    line = lines.index("    .exp()") + 1
    frame = Frame(file=str(module.__file__), line=line, function="f", span=(line, 5, line, 10))
    place = Sources().locate(frame)
    assert place is not None and ast.unparse(place.expression) == "x.exp()"


def test_free_names() -> None:
    given = ("input", "class", "self", "q_proj", "2nd", "a-b", "", "_", "torch")
    expected = ["input_", "class_", "self_", "q_proj", "_2nd", "a_b", "value", "value", "torch_"]
    assert [free_name(name, {"torch"}) for name in given] == expected


def test_a_pass_may_name_what_it_makes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    count = graph.call_function(aten.sum.default, (x,))
    count.meta["name"] = "num_valid"
    graph.output((count,))
    found = origins(graph, reserved={"x"})
    assert (found[x].name, found[count].name) == ("x_", "num_valid")
    assert found[count].statement == ("", 0)
