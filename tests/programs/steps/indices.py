"""Steps that read and write at places."""

from tests.programs.source import B, Body, T, Value, has_batch


def _looked_up(body: Body, v: Value) -> Value | None:
    index = body.pick(kind="int")
    if index is None:
        return None
    width = body.size()
    known = [n for n, text in body.module.members.items() if text.startswith(f"nn.Embedding({index.limit}, ")]
    if known and body.chance(2):
        name = body.choose(known)
        width = int(body.module.members[name].split(", ")[1].split(")")[0])
        table = f"self.{name}"
    else:
        table = body.module.member("table", f"nn.Embedding({index.limit}, {width})")
    return body.bind(f"{table}({index.name})", (*index.dims, width))


def _one_hot(body: Body, v: Value) -> Value | None:
    index = body.pick(lambda i: i.limit < 30, kind="int")
    if index is None:
        return None
    return body.bind(f"F.one_hot({index.name}, {index.limit}).to({v.name}.dtype)", (*index.dims, index.limit))


def _gathered(body: Body, v: Value) -> Value | None:
    if v.last is None:
        return None
    index = body.pick(lambda i: v.dims[:-1] in (i.dims, i.dims[:-1]), kind="int")
    if index is None:
        return None
    rest = index.name if index.limit <= v.last else f"({index.name} % {v.last})"
    if len(index.dims) == len(v.dims):
        return body.bind(f"{v.name}.gather(-1, {rest})", index.dims, of=v)
    return body.bind(f"{v.name}.gather(-1, {rest}.unsqueeze(-1))", (*v.dims[:-1], 1), of=v)


def _indexed(body: Body, v: Value) -> Value | None:
    dim = body.dim(v, lambda size: isinstance(size, int))
    if dim is None:
        return None
    count = body.choose((2, 4, 3))
    places = [body.number(0, v.dims[dim] - 1) for _ in range(count)]
    index = body.module.buffer("places", f"torch.tensor({places})")
    dims = (*v.dims[:dim], count, *v.dims[dim + 1 :])
    forms = (f"{v.name}.index_select({dim}, {index})", f"{v.name}[{':, ' * dim}{index}]")
    return body.bind(body.choose(forms), dims, of=v)


def _table_at(body: Body, v: Value) -> Value | None:
    """A table of parameters at integers of the batch."""
    index = body.pick(kind="int")
    if index is None:
        return None
    width = body.size()
    table = body.module.member("rows", f"nn.Parameter(torch.empty({index.limit}, {width}))")
    forms = (f"{table}[{index.name}]", f"F.embedding({index.name}, {table})", f"({table} * 0.5)[{index.name}]")
    return body.bind(body.choose(forms), (*index.dims, width))


def _extreme(body: Body, v: Value) -> Value | None:
    dim = body.dim(v, lambda size: isinstance(size, int) and size > 1)
    if dim is None or len(v.dims) < 2:
        return None
    count = body.number(1, v.dims[dim])
    rest = (*v.dims[:dim], count, *v.dims[dim + 1 :])
    if body.chance(2):
        return body.bind(f"{v.name}.topk({count}, {dim})[0]", rest, of=v)
    body.module.lines.append(f"best, places = {v.name}.topk({count}, {dim})")
    body.values["best"] = value = Value(name="best", dims=rest)
    body.values["places"] = Value(name="places", dims=rest, kind="int", limit=v.dims[dim])
    return value


def _integers(body: Body, v: Value) -> Value | None:
    index = body.pick(lambda i: i.limit > 1, kind="int")
    if index is None:
        return None
    if body.chance(2):
        return body.bind(f"{index.name} == {body.number(0, index.limit - 1)}", index.dims, kind="bool")
    return body.bind(f"({index.name} * 3 + 1) % {index.limit}", index.dims, kind="int", limit=index.limit)


def _positions(body: Body, v: Value) -> Value | None:
    if len(v.dims) < 2 or v.dims[-2] != T or v.last is None:
        return None
    form = body.choose(("arange", "table", "ones", "buffer"))
    if form == "table":
        table = body.module.member("positions", f"nn.Embedding(16, {v.last})")
        return body.bind(f"{v.name} + {table}(torch.arange(T, device={v.name}.device))", v.dims, of=v)
    if form == "ones":
        ones = f"torch.ones(B, T, {v.last})" if v.dims == (B, T, v.last) else f"torch.ones_like({v.name})"
        return body.bind(f"{v.name} + {ones}", v.dims, of=v)
    if form == "buffer":
        table = f"torch.linspace(-1, 1, {16 * v.last}).view(16, {v.last})"
        name = body.module.buffer("slopes", table)
        return body.bind(f"{v.name} + {name}[:T]", v.dims, of=v)
    return body.bind(f"{v.name} * (torch.arange(T, device={v.name}.device).unsqueeze(-1) * 0.1 + 0.5)", v.dims, of=v)


def _written(body: Body, v: Value) -> Value | None:
    if v.last is None:
        return None
    lines: list[str] = []
    other = body.pick(lambda u: u is not v and u.dims == v.dims)
    forms = [
        "{n}.mul_(0.5)", "{n}.add_(1.0)", "{n}[..., :1] *= 0.5", "{n}[..., 0] = 0.3", "{n}[..., -1] += 1.0",
        "{n}.masked_fill_({n} > 0.8, 0.1)", "{n}.clamp_(-1.0, 1.0)", "{n} += 0.25",
        "{n}[..., :1] = {n}[..., -1:].clone()",
    ]  # fmt: skip
    if other is not None:
        with_other = ("{n}.add_({u})", "{n}[..., :1] = {u}[..., :1]", "{n}.copy_({u} * 2)", "{n}.mul_({u})")
        forms += [form.replace("{u}", other.name) for form in with_other]
    if len(v.dims) > 2 and not has_batch(v.dims[1]):
        forms += ["{n}[:, 0] += 1.0", "{n}[:, -1] = 0.0", "{n}[:, :1].mul_(2.0)"]
        forms += ["{n}.transpose(1, 2)[..., 0].add_(1.0)"]
    chosen = [body.choose(forms) for _ in range(body.number(1, 2))]
    result = body.bind(f"{v.name}.clone()", v.dims)
    for form in chosen:
        lines.append(form.format(n=result.name))
    body.module.lines += lines
    return result


INDICES = (
    _looked_up,
    _one_hot,
    _gathered,
    _indexed,
    _table_at,
    _extreme,
    _integers,
    _positions,
    *(_written,) * 2,
)
"""The common ones several times."""
