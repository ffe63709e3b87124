"""Random programs, meshes and plans as hypothesis strategies."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.programs.losses import loss
from tests.programs.source import HEADER, SIZES, B, Body, Draw, Module, Program, Size, T, Value, has_batch
from tests.programs.steps import step

VOCABULARIES = (8, 12, 7, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A program on a mesh with a plan; mesh has dp, pp and tp."""

    program: Program
    mesh: dict[str, int]
    plan: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.program}\n# mesh {self.mesh}, plan {self.plan}"


@st.composite
def cases(draw: Draw, stages: bool = False) -> Case:
    """A case. ``stages``: with pipeline stages and all that a plan can say; else what types alone decide."""
    sizes = st.sampled_from((1, 2, 3, 4))
    dp, tp, pp = draw(sizes), draw(sizes), draw(st.sampled_from((1, 2, 3))) if stages else 1
    while dp * tp * pp > 8:
        dp, tp = (dp - 1, tp) if dp >= tp else (dp, tp - 1)
    if dp * tp * pp == 1:
        tp = 2
    microbatches = draw(st.sampled_from((1, 2, 3))) if stages or dp * tp < 8 else 1
    plan: dict[str, Any] = {"microbatches": microbatches, "sequence_parallel": draw(st.booleans())}
    if stages:
        plan |= {"zero": draw(st.integers(0, 3)), "schedule": draw(st.sampled_from(("1f1b", "gpipe")))}
        plan["reshard"] = draw(st.sampled_from((None, "step", "microbatch")))
    size = dp * microbatches * draw(st.sampled_from((1, 2)))
    length = draw(st.sampled_from((4, 6, 5)))
    if plan["sequence_parallel"]:
        length = -(-length // tp) * tp  # pieces of sequences are equal
    program = draw(programs(max(size, 2), length, pp))
    return Case(program=program, mesh={"dp": dp, "pp": pp, "tp": tp}, plan=plan)


@st.composite
def programs(draw: Draw, size: int, length: int, num_layers: int = 1) -> Program:
    """A program for a batch of ``size`` samples with sequences of ``length``, with at least ``num_layers`` layers."""
    inputs = _inputs(draw, length)
    model = Module(name="Model", arguments=list(inputs))
    body = Body(draw=draw, module=model, values=dict(inputs))
    x = _first(body)
    for _ in range(body.number(0, 2)):
        step(body)
    layer, lead = Module(name="Layer"), x.dims[:-1]
    if num_layers > 1 or not body.chance(4):
        _layers(body, layer, x.dims, lead, num_layers)
    for _ in range(body.number(0, 5)):
        step(body)
    loss(body)
    parts = [module.text() for module in (layer, model) if module.lines]
    return Program(
        source="\n\n".join([HEADER, *parts]),
        inputs=inputs,
        mixes=model.mixes or layer.mixes,
        sizes={"B": size, "T": length},
    )


def _inputs(draw: Draw, length: int) -> dict[str, Value]:
    vocabulary = draw(st.sampled_from(VOCABULARIES))
    kind = draw(st.sampled_from(("tokens", "tokens", "sequence", "vectors", "image")))
    width = draw(st.sampled_from(SIZES[:6]))
    firsts: dict[str, Value] = {
        "tokens": Value(name="tokens", dims=(B, T), kind="int", limit=vocabulary),
        "sequence": Value(name="sequence", dims=(B, length, width)),
        "vectors": Value(name="vectors", dims=(B, width)),
        "image": Value(name="image", dims=(B, 3, 4, 4)),
    }
    lead: tuple[Size, ...] = {"tokens": (B, T), "sequence": (B, length), "vectors": (B,), "image": (B, 4)}[kind]
    found = [firsts[kind]]
    if draw(st.booleans()):
        found.append(Value(name="labels", dims=lead, kind="int", limit=vocabulary))
    if draw(st.integers(0, 2)) == 2:
        found.append(Value(name="weights", dims=lead))
    if draw(st.integers(0, 2)) == 2:
        found.append(Value(name="mask", dims=lead, kind="bool"))
    if draw(st.integers(0, 5)) == 5:
        found.append(Value(name="extra", dims=(B, 4)))
    return {value.name: value for value in found}


def _first(body: Body) -> Value:
    """The features (lead dims, width) that layers work on."""
    (first, *_), width = body.values.values(), body.choose(SIZES[:6])
    if first.name == "tokens":
        table = body.module.member("embed", f"nn.Embedding({first.limit}, {width})")
        return _named(body, "x", f"{table}(tokens)", (*first.dims, width))
    if first.name == "image":
        conv = body.module.member("patches", f"nn.Conv2d(3, {width}, 2, stride=2)")
        return _named(body, "x", f"{conv}(image).flatten(2).transpose(1, 2)", (B, 4, width))
    linear = body.module.member("first", f"nn.Linear({first.last}, {width})")
    return _named(body, "x", f"{linear}({first.name})", (*first.dims[:-1], width))


def _named(body: Body, name: str, text: str, dims: tuple[Size, ...]) -> Value:
    body.module.lines.append(f"{name} = {text}")
    body.values.pop(name, None)
    body.values[name] = value = Value(name=name, dims=dims)
    return value


def _layers(body: Body, layer: Module, dims: tuple[Size, ...], lead: tuple[Size, ...], num_layers: int) -> None:
    """A list of layers of one drawn class, and the loop over them; they may take and give more than x."""
    if "x" not in body.values or body.values["x"].dims != dims:
        linear = body.module.member("again", f"nn.Linear({{}}, {dims[-1]})")
        value = body.pick(lambda v: v.dims[:-1] == lead and v.last is not None)
        if value is None:
            del body.module.members[linear.removeprefix("self.")]
            return
        body.module.members[linear.removeprefix("self.")] = f"nn.Linear({value.last}, {dims[-1]})"
        _named(body, "x", f"{linear}({value.name})", dims)
    x = body.values["x"]
    given = body.pick(lambda v: v is not x and bool(v.dims) and has_batch(v.dims[0])) if body.chance(3) else None
    mask = body.pick(kind="bool") if body.chance(3) else None
    more_inputs = [(name, value) for name, value in (("memory", given), ("seen", mask)) if value is not None]
    outer = [value for _, value in more_inputs]
    inner = [Value(name=name, dims=value.dims, kind=value.kind) for name, value in more_inputs]
    layer.arguments = ["x", *(v.name for v in inner)]
    inside = Body(draw=body.draw, module=layer, values={v.name: v for v in (*inner, x)})
    for _ in range(body.number(1, 6)):
        step(inside)
    fitting = inside.pick(lambda v: v.dims[:-1] == lead and v.last is not None)
    assert fitting is not None
    if fitting.dims == dims and fitting.name != "x" and inside.chance(3):
        result = fitting.name
    else:
        out = layer.member("out", f"nn.Linear({fitting.last}, {dims[-1]}, bias={inside.chance(2)})")
        result = f"{out}({fitting.name})"
    if inside.values.get("x") == x and layer.lines and not any(line.startswith("x =") for line in layer.lines):
        result = f"x + {result}"
    unread = [v for v in inside.unread() if v.name not in ("x", fitting.name) and v.dims]
    more = unread[0] if unread and inside.chance(2) else None
    layer.lines.append(f"return {result}" + (f", {more.name}" if more is not None else ""))
    count = max(num_layers, body.number(1, 3))
    body.module.member("layers", f"nn.ModuleList(Layer() for _ in range({count}))")
    arguments = ", ".join(("x", *(v.name for v in outer)))
    body.module.lines += ["more = []"] if more is not None else []
    body.module.lines.append("for layer in self.layers:")
    twice = more is None and body.chance(5)
    if more is not None:
        body.module.lines += [f"    x, found = layer({arguments})", "    more.append(found)", "more = sum(more)"]
        body.values["more"] = Value(name="more", dims=more.dims)
    else:
        body.module.lines.append(f"    x = layer({arguments})")
        if twice:
            body.module.lines.append(f"    x = layer({arguments}) * 0.5")
    body.values.pop("x")
    body.values["x"] = Value(name="x", dims=dims)
    _shared(body, layer, count)


def _shared(body: Body, layer: Module, count: int) -> None:
    """Some parameters tied or frozen."""
    linears = [name for name, text in layer.members.items() if text.startswith("nn.Linear")]
    if count > 1 and linears and body.chance(4):
        name = body.choose(linears)
        body.module.after.append(f"self.layers[{count - 1}].{name}.weight = self.layers[0].{name}.weight")
    if body.chance(6):
        frozen = body.choose(("layers[0]", *(name for name in ("embed", "first") if name in body.module.members)))
        body.module.after.append(f"self.{frozen}.requires_grad_(False)")
