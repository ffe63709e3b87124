"""How a random forward ends: terms of a loss over its values."""

from collections.abc import Callable

from tests.programs.source import Body, Value, has_batch

Term = Callable[[Body, Value], str | None]
"""An expression without dims; None where the value does not fit."""


def _labelled(body: Body, v: Value) -> str | None:
    labels = body.values.get("labels")
    if labels is None or v.last is None or v.dims[:-1] != labels.dims:
        return None
    classes, tied = labels.limit, body.module.members.get("embed", "")
    if tied == f"nn.Embedding({classes}, {v.last})" and body.chance(2):
        text = f"F.linear({v.name}, self.embed.weight)"
    else:
        head = body.module.member("head", f"nn.Linear({v.last}, {classes}, bias={body.chance(2)})")
        text = f"{head}({v.name})"
    body.module.lines.append(f"logits = {text}")
    logits, flat = ("logits.flatten(0, 1)", "labels.flatten()") if len(labels.dims) == 2 else ("logits", "labels")
    options = body.choose(("", ", reduction='sum'", ", label_smoothing=0.1", ", ignore_index=1", "weight"))
    if options == "weight":
        if "class_weights" not in body.module.members:
            body.module.buffer("class_weights", f"torch.linspace(0.5, 2.0, {classes})")
        options = ", weight=self.class_weights"
    if "ignore_index" in options:
        flat = f"{flat}.clamp(min=0)"
    forms = [
        f"F.cross_entropy({logits}, {flat}{options})",
        f"F.nll_loss({logits}.log_softmax(-1), {flat}{'' if 'smooth' in options else options})",
        f"F.cross_entropy({logits}, {flat}, reduction='none').mean()",
    ]
    if len(labels.dims) == 2:
        forms.append("F.cross_entropy(logits.transpose(1, 2), labels)")
        forms.append("F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())")
    if "weights" in body.values and body.values["weights"].dims == labels.dims:
        picked = "logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)"
        forms.append(f"-({picked} * weights).sum() / weights.sum()")
    if "weight=" not in options:
        forms.append("F.cross_entropy(" + logits + f", {logits}.detach().roll(1, -1).softmax(-1))")
    return body.choose(forms)


def _average(body: Body, v: Value) -> str | None:
    forms = ["{v}.pow(2).mean()", "torch.tanh({v}).mean()", "{v}.square().sum() * 0.01"]
    if len(v.dims) > 1 and v.last is not None:
        forms += ["{v}.pow(2).sum(-1).mean()", "{v}.logsumexp(-1).mean()", "torch.tanh({v}).sum(-1).square().mean()"]
    if v.dims and has_batch(v.dims[0]):
        forms += ["torch.tanh({v}).sum() / {v}.shape[0]", "{v}.abs().mean(0).sum()"]
    if body.chance(12):
        forms = ["{v}.mean().square()", "{v}.square().sum() / ({v}.detach().abs().sum() + 1.0)"]
        body.module.mixes = True
    form = body.choose(forms)
    return form.format(v=v.name)


def _weighted(body: Body, v: Value) -> str | None:
    weights = body.values.get("weights")
    if weights is None or len(v.dims) <= len(weights.dims) or v.dims[: len(weights.dims)] != weights.dims:
        return None
    wide = f"weights[(...,{' None,' * (len(v.dims) - len(weights.dims))})]"
    return f"({v.name}.square() * {wide}).sum() / weights.sum()"


def _masked(body: Body, v: Value) -> str | None:
    mask = body.pick(lambda m: bool(m.dims) and m.dims == v.dims[: len(m.dims)], kind="bool")
    if mask is None or len(mask.dims) == len(v.dims) or mask.name != "mask":
        return None
    wide = f"mask[(...,{' None,' * (len(v.dims) - len(mask.dims))})]"
    return f"({v.name}.square() * {wide}).sum() / mask.sum()"


def _elementwise(body: Body, v: Value) -> str | None:
    forms = (
        "F.mse_loss({v}, torch.tanh({v}).detach())", "F.l1_loss({v}, {v}.detach() * 0.5)",
        "F.smooth_l1_loss({v}, torch.zeros_like({v}), reduction='sum') * 0.02",
        "F.huber_loss({v}, torch.ones_like({v}))",
        "F.binary_cross_entropy_with_logits({v}, torch.sigmoid({v} * 2).detach())",
        "F.soft_margin_loss({v}, torch.ones_like({v}))",
    )  # fmt: skip
    return body.choose(forms).format(v=v.name)


def _divergence(body: Body, v: Value) -> str | None:
    if v.last is None or v.last < 2 or len(v.dims) < 2 or not has_batch(v.dims[0]):
        return None
    how = body.choose(("batchmean", "sum", "mean"))
    return f"F.kl_div({v.name}.log_softmax(-1), ({v.name} * 0.5).softmax(-1).detach(), reduction='{how}')"


def _pairs(body: Body, v: Value) -> str | None:
    """Every sample against every other."""
    if len(v.dims) != 2 or not has_batch(v.dims[0]) or v.last is None or not body.chance(4):
        return None
    body.module.mixes = True
    return f"F.cross_entropy({v.name} @ {v.name}.t(), torch.arange({v.name}.shape[0]))"


TERMS: tuple[Term, ...] = (
    *(_labelled,) * 4, *(_average,) * 4, *(_weighted,) * 2, *(_masked,) * 2, _elementwise, _divergence, _pairs,
)  # fmt: skip


def loss(body: Body) -> None:
    """The last lines of a forward: one to three terms, each on a value of its own."""
    terms: list[str] = []
    unread = [value for value in body.unread() if value.name not in ("weights", "extra")]
    for number in range(body.number(max(1, min(len(unread), 2)), 3)):
        value = unread[number] if number < len(unread) else body.pick()
        if value is None:
            continue
        text = body.choose(TERMS)(body, value) or _average(body, value) or ""
        factor = body.choose(("", " * 0.5", " * 2")) if number else ""
        terms.append(f"{text}{factor}" if not text.startswith("-") else f"({text}){factor}")
    body.module.lines.append(f"return {' + '.join(terms)}")
