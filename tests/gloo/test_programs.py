"""Random programs, emitted for random meshes with stages and ZeRO, equal one device."""

import functools

from hypothesis import given

from tests.gloo.pool import OneProcess
from tests.programs.checking import check_bundle, holds, property_settings
from tests.programs.drawing import Case, cases


@property_settings(examples=4)
@given(case=cases(stages=True))
def test_random_programs_equal_one_device(case: Case, threads: OneProcess) -> None:
    holds(functools.partial(check_bundle, pool=threads), case)
