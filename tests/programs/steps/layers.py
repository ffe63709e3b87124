"""Attention, convolutions and pooling."""

from tests.programs.source import Body, Value, has_batch


def _attention(body: Body, v: Value) -> Value | None:
    if len(v.dims) != 3 or v.last is None or has_batch(v.dims[1]):
        return None
    heads, width = body.choose((2, 4, 3, 6, 1)), body.choose((2, 4, 3))
    groups = body.choose([g for g in (heads, 1, 2) if heads % g == 0])
    read = {}
    for stem, count in (("query", heads), ("key", groups), ("value", groups)):
        linear = body.module.member(stem, f"nn.Linear({v.last}, {count * width}, bias={body.chance(2)})")
        read[stem] = linear
        body.module.lines.append(f"{stem} = {linear}({v.name}).unflatten(-1, ({count}, {width})).transpose(1, 2)")
    forms = ["sdpa", "causal", "by hand", "causal by hand"]
    mask = body.pick(lambda m: m.dims == v.dims[:2], kind="bool")
    if mask is not None:
        forms.append("mask")
    form = body.choose(forms)
    if form.endswith("by hand") and groups != heads:
        body.module.lines.append(f"key = key.repeat_interleave({heads // groups}, 1)")
        body.module.lines.append(f"value = value.repeat_interleave({heads // groups}, 1)")
    if form.endswith("by hand"):
        scores = "(query @ key.transpose(-1, -2)) * 0.5"
        if form.startswith("causal"):
            scores = f"({scores}).masked_fill(torch.ones({v.name}.shape[1], {v.name}.shape[1]).tril() == 0, -1e4)"
        body.module.lines.append(f"attended = ({scores}).softmax(-1) @ value")
    else:
        options = ", enable_gqa=True" if groups != heads else ""
        options += ", is_causal=True" if form == "causal" else ""
        if form == "mask":
            assert mask is not None
            body.module.lines.append(f"seen = {mask.name}[:, None, None, :] | (torch.arange({v.name}.shape[1]) == 0)")
            options += ", attn_mask=seen"
        body.module.lines.append(f"attended = F.scaled_dot_product_attention(query, key, value{options})")
    result = "attended.transpose(1, 2)"
    result += body.choose((".flatten(2)", f".reshape({v.name}.shape[0], {v.name}.shape[1], -1)"))
    return body.bind(result, (*v.dims[:2], heads * width), of=v)


def _fused_attention(body: Body, v: Value) -> Value | None:
    if len(v.dims) != 3 or v.last is None or has_batch(v.dims[1]):
        return None
    heads, width = body.choose((2, 4, 3)), body.choose((2, 3))
    fused = body.module.member("fused", f"nn.Linear({v.last}, {3 * heads * width})")
    form = body.choose((
        "(part.unflatten(-1, ({h}, {w})).transpose(1, 2) for part in {fused}({v}).chunk(3, -1))",
        "{fused}({v}).unflatten(-1, (3, {h}, {w})).permute(2, 0, 3, 1, 4)",
        "{fused}({v}).unflatten(-1, ({h}, 3 * {w})).transpose(1, 2).chunk(3, -1)",
    ))  # fmt: skip
    split = form.format(fused=fused, v=v.name, h=heads, w=width)
    body.module.lines.append(f"query, key, value = {split}")
    body.module.lines.append("attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)")
    return body.bind("attended.transpose(1, 2).flatten(2)", (*v.dims[:2], heads * width), of=v)


def _convolved(body: Body, v: Value) -> Value | None:
    if len(v.dims) == 3 and isinstance(v.dims[1], int) and v.dims[0] != 1 and not has_batch(v.dims[2]):
        out = body.choose((4, 6, 3))
        groups = 1
        if v.dims[1] == out and body.chance(2):
            groups = out
        options = f"padding=1, groups={groups}, bias={body.chance(2)}"
        conv = body.module.member("conv", f"nn.Conv1d({v.dims[1]}, {out}, 3, {options})")
        return body.bind(f"{conv}({v.name})", (v.dims[0], out, v.dims[2]), of=v)
    if len(v.dims) == 4 and all(isinstance(size, int) for size in v.dims[1:]) and v.dims[0] != 1:
        out = body.choose((4, 6, 3))
        conv = body.module.member("conv", f"nn.Conv2d({v.dims[1]}, {out}, 3, padding=1, bias={body.chance(2)})")
        return body.bind(f"{conv}({v.name})", (v.dims[0], out, *v.dims[2:]), of=v)
    return None


def _pooled(body: Body, v: Value) -> Value | None:
    if len(v.dims) != 3 or v.last is None or v.last < 2 or has_batch(v.dims[1]):
        return None
    form = body.choose(("F.avg_pool1d({v}, 2)", "F.max_pool1d({v}, 2)", "F.adaptive_avg_pool1d({v}, 2)"))
    return body.bind(form.format(v=v.name), (*v.dims[:2], 2 if "adaptive" in form else v.last // 2), of=v)


LAYERS = (
    *(_attention,) * 2,
    _fused_attention,
    *(_convolved,) * 2,
    _pooled,
)
"""The common ones several times."""
