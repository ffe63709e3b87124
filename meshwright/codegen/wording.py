"""Words of emitted files: identifiers, strings, tuples, ranges of modules and of ranks."""

import re
import textwrap
from collections.abc import Container, Sequence


def identifier(text: str) -> str:
    """``text`` as an identifier."""
    name = re.sub(r"\W", "_", text) or "value"
    return f"_{name}" if name[0].isdigit() else name


def unused(name: str, taken: Container[str]) -> str:
    """``name``, or the first of ``name_2``, ``name_3``, ... that is not taken."""
    number, base = 1, name
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def quoted(text: str) -> str:
    """``text`` as a string literal."""
    return '"' + repr(text)[1:-1].replace('"', '\\"') + '"'


def tuple_text(items: Sequence[object]) -> str:
    """``(64,)``, ``(64, 32)``, ``()``: a tuple of what is already text or a number."""
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(map(str, items))})"


def comment(text: str) -> str:
    """Text of the model's own as it may stand in a comment: one line."""
    return " ".join(text.split())


def wrapped(text: str, width: int = 116, indent: str = "") -> str:
    """Text in lines, as it may stand in a docstring."""
    return (
        f"\n{indent}".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))
        .replace("\\", "/")
        .replace('"', "'")
    )


def paths_text(paths: Sequence[str], more: Sequence[str] = ()) -> str:
    """Module paths with numbered ones as ranges: ``model.embed_tokens and model.layers.0-1``."""
    found: list[tuple[str, list[int]]] = []
    for path in paths:
        match = re.match(r"^(.*\.|)(\d+)$", path)
        stem, number = (match[1], int(match[2])) if match else (path, -1)
        if match and found and found[-1][0] == stem and found[-1][1] and found[-1][1][-1] == number - 1:
            found[-1][1].append(number)
        else:
            found.append((stem, [number] if match else []))
    names = [f"{stem}{n[0]}" + (f"-{n[-1]}" if len(n) > 1 else "") if n else stem for stem, n in found]
    names = [*dict.fromkeys(" ".join(n.split()) for n in names if n), *more]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def ranks_text(ranks: Sequence[int]) -> str:
    """``ranks 0, 1, 4, 5``: all of a few, the ends of many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) <= 8:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"ranks {ranks[0]}, {ranks[1]}, ..., {ranks[-1]} ({len(ranks)} ranks)"
