"""Steps element by element, and along dims."""

from tests.programs.source import Body, Size, Value, has_batch


def _unary(body: Body, v: Value) -> Value | None:
    forms = (
        "torch.tanh({v})", "F.relu({v})", "F.gelu({v})", "{v} * 0.5", "{v} + 1.0", "torch.sigmoid({v})", "F.silu({v})",
        "-{v}", "torch.tanh({v}).exp()", "F.softplus({v})", "{v}.abs()", "torch.tanh({v}).square()", "1.0 - {v}",
        "{v}.clamp(-1.0, 1.5)", "torch.sin({v})", "torch.where({v} > 0, {v}, 0.1 * {v})",
        "{v}.masked_fill({v} > 1, 0.5)", "{v} * {v}.detach()",
        "{v} / 3", "2.0 / (1.0 + {v} * {v})", "({v} * {v} + 1.0).sqrt()", "({v} * {v} + 1.0).log()",
        "F.leaky_relu({v}, 0.2)", "F.elu({v})", "{v}.clone()", "torch.rsqrt({v} * {v} + 0.5)",
        "{v}.masked_fill({v} < 0, 0)",
    )  # fmt: skip
    return body.bind(body.choose(forms).format(v=v.name), v.dims, of=v)


def _binary(body: Body, v: Value) -> Value | None:
    other = body.pick(lambda u: u is not v and _broadcast(u.dims, v.dims) is not None)
    if other is None:
        return None
    forms = ("{v} + {u}", "{v} * {u}", "{u} - {v}", "torch.maximum({v}, {u})", "{v} / ({u}.abs() + 1.0)",
             "torch.where({u} > 0, {v}, {u})", "torch.lerp({v}, {u}, 0.3)", "torch.addcmul({v}, {u}, {u})",
             "torch.add({v}, {u}, alpha=2)")  # fmt: skip
    form = body.choose(forms)
    dims = _broadcast(other.dims, v.dims)
    if "lerp" in form and other.dims != v.dims:
        form = forms[0]
    assert dims is not None
    return body.bind(form.format(v=v.name, u=other.name), dims, of=v)


def _broadcast(a: tuple[Size, ...], b: tuple[Size, ...]) -> tuple[Size, ...] | None:
    width = max(len(a), len(b))
    a, b = (1,) * (width - len(a)) + a, (1,) * (width - len(b)) + b
    if any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        return None
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def _masked(body: Body, v: Value) -> Value | None:
    mask = body.pick(lambda m: _broadcast(m.dims, v.dims) == v.dims, kind="bool")
    if mask is None:
        dims = v.dims if not body.chance(3) else (*v.dims[:-1], 1) if v.dims else ()
        text = f"{v.name} > 0.2" if dims == v.dims else f"{v.name}[..., :1] < 0.3"
        return body.bind(text, dims, kind="bool")
    forms = ("{v}.masked_fill({m}, 0.0)", "torch.where({m}, {v}, 0.3)", "{v} * {m}", "{v}.masked_fill(~{m}, -1.0)")
    return body.bind(body.choose(forms).format(v=v.name, m=mask.name), v.dims, of=v)


def _wide_mask(body: Body, v: Value) -> Value | None:
    """A mask over the first dims, put on all."""
    mask = body.pick(lambda m: 0 < len(m.dims) < len(v.dims) and v.dims[: len(m.dims)] == m.dims, kind="bool")
    if mask is None:
        return None
    wide = f"{mask.name}[(...,{' None,' * (len(v.dims) - len(mask.dims))})]"
    forms = ("{v} * {m}", "{v}.masked_fill(~{m}, 0)", "torch.where({m}, {v}, -{v})")
    return body.bind(body.choose(forms).format(v=v.name, m=wide), v.dims, of=v)


def _stopped(body: Body, v: Value) -> Value | None:
    if body.chance(2):
        body.module.lines.append("with torch.no_grad():")
        value = body.bind(f"torch.tanh({v.name}) * 0.5", v.dims)
        body.module.lines[-1] = "    " + body.module.lines[-1]
        return value
    return body.bind(f"{v.name}.detach()", v.dims)


def _along(body: Body, v: Value) -> Value | None:
    dim = body.dim(v)
    if dim is None:
        return None
    forms = (
        "{v}.softmax({d})", "{v}.log_softmax({d})", "{v}.cumsum({d})", "F.normalize({v}, dim={d})", "{v}.flip({d})",
        "{v}.roll(1, {d})", "{v}.sort({d})[0]", "{v} - {v}.mean({d}, keepdim=True)",
        "{v} / {v}.norm(dim={d}, keepdim=True)",
        "{v}.cummax({d}).values", "torch.tanh({v}).cumprod({d})", "{v}.logcumsumexp({d})", "F.softmin({v}, {d})",
    )  # fmt: skip
    return body.bind(body.choose(forms).format(v=v.name, d=_sign(body, v, dim)), v.dims, of=v)


def _sign(body: Body, v: Value, dim: int) -> int:
    return dim - len(v.dims) if body.chance(2) else dim


def _reduced(body: Body, v: Value) -> Value | None:
    dim = body.dim(v)
    if dim is None or len(v.dims) < 2:
        return None
    keep = body.chance(2)
    forms = ["sum", "mean", "amax", "amin", "logsumexp", "norm", "argmax"]
    if v.dims[dim] != 1:
        forms += ["var", "std"]
    form = body.choose(forms)
    dims = tuple(1 if d == dim else size for d, size in enumerate(v.dims) if keep or d != dim)
    where = f"{_sign(body, v, dim)}, keepdim={keep}"
    if form == "argmax":
        if not isinstance(v.dims[dim], int):
            return None
        return body.bind(f"{v.name}.argmax({where})", dims, kind="int", limit=v.dims[dim])
    return body.bind(f"{v.name}.{form}({'dim=' * (form == 'norm')}{where})", dims, of=v)


def _reduced_two(body: Body, v: Value) -> Value | None:
    dims = [d for d, size in enumerate(v.dims) if not has_batch(size)]
    if len(dims) < 2 or len(v.dims) < 3:
        return None
    a, b = dims[-2:]
    form = body.choose(("mean", "sum", "amax", "logsumexp"))
    rest = tuple(size for d, size in enumerate(v.dims) if d not in (a, b))
    return body.bind(f"{v.name}.{form}(({a}, {b}))", rest, of=v)


def _normed(body: Body, v: Value) -> Value | None:
    if v.last is None or v.last < 2:
        return None
    kind = body.choose(("layer", "plain", "two", "rms", "by hand"))
    if kind == "by hand":
        scale = body.module.member("gain", f"nn.Parameter(torch.empty({v.last}))")
        text = f"{v.name} * torch.rsqrt({v.name}.pow(2).mean(-1, keepdim=True) + 1e-3) * {scale}"
        return body.bind(text, v.dims, of=v)
    if kind == "two" and len(v.dims) > 1 and isinstance(v.dims[-2], int):
        return body.bind(f"F.layer_norm({v.name}, ({v.dims[-2]}, {v.last}), eps=1e-2)", v.dims, of=v)
    if kind == "plain":
        return body.bind(f"F.layer_norm({v.name}, ({v.last},), eps=1e-2)", v.dims, of=v)
    name = "nn.RMSNorm" if kind == "rms" else "nn.LayerNorm"
    norm = body.module.member("norm", f"{name}({v.last}, eps=1e-2)")
    return body.bind(f"{norm}({v.name})", v.dims, of=v)


def _group_norm(body: Body, v: Value) -> Value | None:
    if len(v.dims) < 3 or not isinstance(v.dims[1], int) or v.dims[0] == 1:
        return None
    groups = body.choose([g for g in range(1, v.dims[1] + 1) if v.dims[1] % g == 0])
    norm = body.module.member("groups", f"nn.GroupNorm({groups}, {v.dims[1]}, eps=1e-2)")
    body.module.mixes |= any(has_batch(size) for size in v.dims[1:])
    return body.bind(f"{norm}({v.name})", v.dims, of=v)


ELEMENTS = (
    *(_unary,) * 4,
    *(_binary,) * 3,
    _masked,
    _wide_mask,
    _stopped,
    *(_along,) * 2,
    *(_reduced,) * 2,
    _reduced_two,
    *(_normed,) * 2,
    _group_norm,
)
"""The common ones several times."""
