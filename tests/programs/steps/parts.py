"""Steps that repeat, cut, pad and join."""

from tests.programs.source import Body, T, Value, has_batch, text_of


def _repeated(body: Body, v: Value) -> Value | None:
    dim = body.dim(v, lambda size: isinstance(size, int))
    if dim is None:
        return None
    times = [2 if d == dim else 1 for d in range(len(v.dims))]
    forms = (f"repeat({text_of(times)})", f"repeat_interleave(2, {dim})", f"tile(({text_of(times)}))")
    return body.bind(f"{v.name}.{body.choose(forms)}", (*v.dims[:dim], v.dims[dim] * 2, *v.dims[dim + 1 :]), of=v)


def _cut(body: Body, v: Value) -> Value | None:
    """Parts of a dim, of which some are used."""
    dim = body.dim(v, lambda size: isinstance(size, int) and size > 1)
    if dim is None:
        return None
    size = v.dims[dim]
    form = body.choose(("chunk", "split", "sizes", "slices", "tensor_split"))
    if form in ("chunk", "split"):
        length = body.number(max(1, -(-size // 4)), max(1, size - 1))
        count = -(-size // length)
        lengths = [min(length, size - i * length) for i in range(count)]
        if form == "chunk" and [len(c) for c in _chunks(size, count)] == lengths:
            text = f"{v.name}.chunk({count}, {dim})"
        else:
            text = f"{v.name}.split({length}, dim={dim})"
    else:
        first = body.number(1, size - 1)
        lengths = [first, size - first]
        text = f"{v.name}.split([{first}, {size - first}], {dim})"
        if form == "tensor_split":
            text = f"{v.name}.tensor_split([{first}], dim={dim})"
        if form == "slices":
            lead = ":, " * dim
            text = f"{v.name}[{lead}:{first}], {v.name}[{lead}{first}:]"
    names = [f"part_{i}" for i in range(len(lengths))]
    for name in names:
        body.values.pop(name, None)
    used = [i for i in range(len(names)) if not body.chance(3)] or [0]
    targets = ", ".join(name if i in used else "_" for i, name in enumerate(names))
    body.module.lines.append(f"{targets}{',' * (len(names) == 1)} = {text}")
    value = None
    for i in used:
        dims = (*v.dims[:dim], lengths[i], *v.dims[dim + 1 :])
        body.values[names[i]] = value = Value(name=names[i], dims=dims)
    return value


def _chunks(size: int, count: int) -> list[range]:
    step = -(-size // count)
    return [range(i, min(size, i + step)) for i in range(0, size, step)]


def _sliced(body: Body, v: Value) -> Value | None:
    dim = body.dim(v, lambda size: size == T or (isinstance(size, int) and size > 1))
    if dim is None or has_batch(v.dims[dim]):
        return None
    size, lead = v.dims[dim], ":, " * dim
    if size == T or body.chance(2):
        start = body.choose((1, 0))
        text, left = (f"{lead}1:", size - 1) if start else (f"{lead}:-1", size - 1)
        return body.bind(f"{v.name}[{text}]", (*v.dims[:dim], left, *v.dims[dim + 1 :]), of=v)
    form = body.choose(("step", "select", "middle", "narrow"))
    if form == "select" and len(v.dims) > 1:
        return body.bind(f"{v.name}[{lead}{body.choose((-1, 0, size - 1))}]", (*v.dims[:dim], *v.dims[dim + 1 :]), of=v)
    if form == "step":
        return body.bind(f"{v.name}[{lead}::2]", (*v.dims[:dim], -(-size // 2), *v.dims[dim + 1 :]), of=v)
    start = body.number(0, size - 1)
    length = body.number(1, size - start)
    text = f".narrow({dim}, {start}, {length})" if form == "narrow" else f"[{lead}{start}:{start + length}]"
    return body.bind(f"{v.name}{text}", (*v.dims[:dim], length, *v.dims[dim + 1 :]), of=v)


def _padded(body: Body, v: Value) -> Value | None:
    dim = body.dim(v, lambda size: not has_batch(size))
    if dim is None:
        return None
    amounts = [0, 0] * (len(v.dims) - 1 - dim) + list(body.choose(((1, 0), (0, 2), (1, 1))))
    value = body.choose(("", ", value=0.5"))
    grown = v.dims[dim] + amounts[-1] + amounts[-2]
    return body.bind(f"F.pad({v.name}, ({text_of(amounts)}){value})", (*v.dims[:dim], grown, *v.dims[dim + 1 :]), of=v)


def _joined(body: Body, v: Value) -> Value | None:
    other = body.pick(lambda u: len(u.dims) == len(v.dims) > 0)
    if other is None:
        return None
    differing = [d for d in range(len(v.dims)) if v.dims[d] != other.dims[d]]
    if len(differing) > 1:
        return None
    dim = differing[0] if differing else body.choose([d for d, size in enumerate(v.dims) if not has_batch(size)] or [0])
    if has_batch(v.dims[dim]):
        return None
    if not differing and body.chance(3):
        new = body.number(0, len(v.dims))
        return body.bind(f"torch.stack([{v.name}, {other.name}], {new})", (*v.dims[:new], 2, *v.dims[new:]), of=v)
    size = v.dims[dim] + other.dims[dim]
    return body.bind(f"torch.cat([{v.name}, {other.name}], {dim})", (*v.dims[:dim], size, *v.dims[dim + 1 :]), of=v)


PARTS = (
    _repeated,
    *(_cut,) * 2,
    *(_sliced,) * 2,
    _padded,
    *(_joined,) * 2,
)
"""The common ones several times."""
