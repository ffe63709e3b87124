"""Steps that see the same elements in another shape."""

from tests.programs.source import B, Body, Value, has_batch, product, text_of


def _transposed(body: Body, v: Value) -> Value | None:
    if len(v.dims) < 2:
        return None
    first = 0 if len(v.dims) == 2 or body.chance(4) else 1
    a, b = body.choose([(a, b) for a in range(first, len(v.dims)) for b in range(a + 1, len(v.dims))])
    dims = list(v.dims)
    dims[a], dims[b] = dims[b], dims[a]
    order = list(range(len(dims)))
    order[a], order[b] = b, a
    forms = ("{v}.transpose({a}, {b})", "{v}.permute({order})", "{v}.transpose({a}, {b}).contiguous()")
    text = body.choose(forms).format(v=v.name, a=a, b=b, order=text_of(order))
    return body.bind(text, dims, of=v)


def _moved(body: Body, v: Value) -> Value | None:
    if len(v.dims) < 3:
        return None
    return body.bind(f"{v.name}.movedim(1, -1)", (v.dims[0], *v.dims[2:], v.dims[1]), of=v)


def _flattened(body: Body, v: Value) -> Value | None:
    if len(v.dims) < 2:
        return None
    start = body.choose([d for d in range(len(v.dims) - 1)][::-1])
    if has_batch(v.dims[start + 1]):
        if not body.chance(8):
            return None
        body.module.mixes = True  # as soon as it is cut otherwise
    dims = (*v.dims[:start], product(v.dims[start : start + 2]), *v.dims[start + 2 :])
    forms = (f"{v.name}.flatten({start}, {start + 1})", f"{v.name}.reshape({text_of(dims)})")
    return body.bind(body.choose(forms), dims, of=v)


def _unflattened(body: Body, v: Value) -> Value | None:
    fixed = [(d, size) for d, size in enumerate(v.dims) if isinstance(size, int)]
    candidates = [(d, p) for d, size in fixed for p in (2, 3, 4, 6) if size % p == 0 and size > p]
    if len(v.dims) == 1 or not candidates or len(v.dims) > 4:
        return _folded_back(body, v)
    dim, parts = body.choose(candidates[::-1])
    dims = (*v.dims[:dim], parts, v.dims[dim] // parts, *v.dims[dim + 1 :])
    free = (*dims[:dim], -1, *dims[dim + 1 :])
    forms = (f"unflatten({dim}, ({parts}, -1))", f"reshape({text_of(free)})", f"reshape({text_of(dims)})")
    return body.bind(f"{v.name}.{body.choose(forms)}", dims, of=v)


def _folded_back(body: Body, v: Value) -> Value | None:
    found = [d for d, size in enumerate(v.dims) if has_batch(size) and size != B]
    if not found:
        return None
    dims = (*v.dims[: found[0]], B, product((v.dims[found[0]] / B,)), *v.dims[found[0] + 1 :])
    return body.bind(f"{v.name}.reshape({text_of(dims)})", dims, of=v)


def _regrouped(body: Body, v: Value) -> Value | None:
    """Sizes of two neighbours swapped without moving anything, or halves moved from one dim to the next."""
    pairs = [d for d in range(len(v.dims) - 1) if all(isinstance(s, int) for s in v.dims[d : d + 2])]
    if not pairs:
        return None
    d = body.choose(pairs)
    a, b = v.dims[d : d + 2]
    new = body.choose([(b, a)] + ([(a * 2, b // 2)] if b % 2 == 0 else []) + ([(a // 2, b * 2)] if a % 2 == 0 else []))
    dims = (*v.dims[:d], *new, *v.dims[d + 2 :])
    return body.bind(f"{v.name}.reshape({text_of(dims)})", dims, of=v)


def _more_dims(body: Body, v: Value) -> Value | None:
    if len(v.dims) > 3:
        return None
    dim = body.number(0, len(v.dims))
    if body.chance(2):
        return body.bind(f"{v.name}.unsqueeze({dim})", (*v.dims[:dim], 1, *v.dims[dim:]), of=v)
    times = body.choose((2, 3, 4))
    sizes = ["-1"] * len(v.dims)
    sizes.insert(dim, str(times))
    text = f"{v.name}.unsqueeze({dim}).expand({', '.join(sizes)})"
    return body.bind(text, (*v.dims[:dim], times, *v.dims[dim:]), of=v)


def _squeezed(body: Body, v: Value) -> Value | None:
    ones = [d for d, size in enumerate(v.dims) if size == 1]
    if not ones or len(v.dims) < 2:
        return None
    dim = body.choose(ones)
    return body.bind(f"{v.name}.squeeze({dim})", (*v.dims[:dim], *v.dims[dim + 1 :]), of=v)


VIEWS = (
    *(_transposed,) * 2,
    _moved,
    *(_flattened,) * 2,
    *(_unflattened,) * 2,
    _folded_back,
    _regrouped,
    _more_dims,
    _squeezed,
)
"""The common ones several times."""
