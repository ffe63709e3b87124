"""Products with parameters and of values."""

from tests.programs.source import Body, Value, has_batch, text_of


def _linear(body: Body, v: Value) -> Value | None:
    if v.last is None or len(v.dims) < 1:
        return None
    known = [name for name, text in body.module.members.items() if text.startswith(f"nn.Linear({v.last}, ")]
    if known and body.chance(4):
        name = body.choose(known)
        out = int(body.module.members[name].split(", ")[1].rstrip(")"))
        return body.bind(f"self.{name}({v.name})", (*v.dims[:-1], out), of=v)
    out = body.size()
    linear = body.module.member("proj", f"nn.Linear({v.last}, {out}, bias={body.chance(2)})")
    return body.bind(f"{linear}({v.name})", (*v.dims[:-1], out), of=v)


def _gated(body: Body, v: Value) -> Value | None:
    if v.last is None:
        return None
    wide = body.choose((8, 12, 6, 5))
    up = body.module.member("up", f"nn.Linear({v.last}, {2 * wide}, bias={body.chance(2)})")
    down = body.module.member("down", f"nn.Linear({wide}, {v.last}, bias={body.chance(2)})")
    first, second = ("up_a", "up_b")
    body.module.lines.append(f"{first}, {second} = {up}({v.name}).chunk(2, -1)")
    return body.bind(f"{down}(F.silu({first}) * {second})", v.dims, of=v)


def _product(body: Body, v: Value) -> Value | None:
    """With a bare parameter."""
    if v.last is None:
        return None
    known = [n for n, text in body.module.members.items() if text.startswith(f"nn.Parameter(torch.empty({v.last}, ")]
    if known and body.chance(3):
        name = body.choose(known)
        weight, out = f"self.{name}", int(body.module.members[name].split(", ")[1].split(")")[0])
    else:
        out = body.size()
        weight = body.module.member("weight", f"nn.Parameter(torch.empty({v.last}, {out}))")
    letters = "abcde"[: len(v.dims) - 1]
    forms = [
        f"{v.name} @ {weight}",
        f"F.linear({v.name}, {weight}.t())",
        f"torch.matmul({v.name}, {weight} * 0.5)",
        f'torch.einsum("{letters}i,io->{letters}o", {v.name}, {weight})',
        f"{v.name} @ {weight}.softmax(-1)",
    ]
    return body.bind(body.choose(forms), (*v.dims[:-1], out), of=v)


def _scaled(body: Body, v: Value) -> Value | None:
    if body.chance(2) or v.last is None:
        known = [name for name, text in body.module.members.items() if text == "nn.Parameter(torch.tensor(1.5))"]
        name = f"self.{known[0]}" if known else body.module.member("scale", "nn.Parameter(torch.tensor(1.5))")
        form = body.choose(("{v} * {p}", "{p} + {v}", "{v} * {p}.sigmoid()"))
        return body.bind(form.format(v=v.name, p=name), v.dims, of=v)
    shape: tuple[int, ...] = (v.last,)
    if len(v.dims) > 1 and isinstance(v.dims[-2], int) and body.chance(2):
        shape = body.choose(((v.dims[-2], v.last), (v.dims[-2], 1), (1, v.last)))
    name = body.module.member("factor", f"nn.Parameter(torch.empty({text_of(shape)}))")
    form = body.choose(("{v} * {p}", "{v} + {p}", "{v} * {p}.exp()", "{p} - {v}"))
    return body.bind(form.format(v=v.name, p=name), v.dims, of=v)


def _inner_product(body: Body, v: Value) -> Value | None:
    if len(v.dims) < 2:
        return None
    other = body.pick(lambda u: len(u.dims) == len(v.dims) and (*u.dims[:-2], u.last) == (*v.dims[:-2], v.last))
    if other is None or v.last is None:
        return None
    if any(has_batch(size) for size in v.dims[-2:]):
        if not body.chance(16):
            return None
        body.module.mixes = True
    return body.bind(f"{v.name} @ {other.name}.transpose(-1, -2) * 0.3", (*v.dims[:-1], other.dims[-2]), of=v)


def _outer_product(body: Body, v: Value) -> Value | None:
    other = body.pick(lambda u: len(u.dims) >= 2 and u.dims[:-1] == v.dims[:-1])
    if other is None or len(v.dims) < 2 or len(v.dims) > 3:
        return None
    text = f"{v.name}.unsqueeze(-1) * {other.name}.unsqueeze(-2)"
    return body.bind(text, (*v.dims, other.dims[-1]), of=v)


PRODUCTS = (
    *(_linear,) * 4,
    _gated,
    *(_product,) * 2,
    *(_scaled,) * 2,
    _inner_product,
    _outer_product,
)
"""The common ones several times."""
