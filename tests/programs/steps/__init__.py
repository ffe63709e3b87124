"""What a random forward is made of: steps that write lines and leave a new value, or nothing where they do not fit."""

from collections.abc import Callable

from tests.programs.source import Body, Value
from tests.programs.steps.elements import ELEMENTS
from tests.programs.steps.indices import INDICES
from tests.programs.steps.layers import LAYERS
from tests.programs.steps.parts import PARTS
from tests.programs.steps.products import PRODUCTS
from tests.programs.steps.views import VIEWS

STEPS: tuple[Callable[[Body, Value], Value | None], ...] = (
    *ELEMENTS, *PRODUCTS, *VIEWS, *PARTS, *INDICES, *LAYERS,
)  # fmt: skip
MAX_DIMS = 5


def step(body: Body) -> Value | None:
    """One drawn step on a drawn value; None where it does not fit."""
    value = body.pick(lambda v: len(v.dims) <= MAX_DIMS)
    return body.choose(STEPS)(body, value) if value is not None else None
