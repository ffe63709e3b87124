"""The text of schedules."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.runtime.actions import Action, fuse, parse, render, to_ranks

peers = st.lists(st.integers(0, 20), max_size=3, unique=True).map(tuple)
actions = st.builds(Action, kind=st.sampled_from("FB"), microbatch=st.integers(0, 20), receives=peers, sends=peers)


@settings(deadline=None)
@given(st.lists(actions).map(tuple), st.sampled_from(["rank", "stage"]))
def test_there_and_back(row: tuple[Action, ...], form: Any) -> None:
    assert parse(render(row, form), form) == row


def test_several_peers_have_commas() -> None:
    (action,) = parse("0,1>F2>3")
    assert action == Action(kind="F", microbatch=2, receives=(0, 1), sends=(3,))
    assert render([action], "stage") == "s0,s1>F2>s3"


@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        ("F0>2  G1", "rank", "'G1' at position 6 is no action with ranks as peers, as in 0,1>F2>3"),
        ("F0>s1", "rank", "'F0>s1' at position 0 is no action with ranks as peers, as in 0,1>F2>3"),
        ("F0>1", "stage", "'F0>1' at position 0 is no action with stages as peers, as in s0,s1>F2>s3"),
        ("F0 > 1", "rank", "'>' at position 3 is no action with ranks as peers, as in 0,1>F2>3"),
        ("F01", "rank", "'F01' at position 0 is no action with ranks as peers, as in 0,1>F2>3"),
        ("B0  2,2>B1", "rank", "'2,2>B1' at position 4: B1 receives from a peer twice: 2, 2"),
    ],
)
def test_malformed_text_is_refused_with_its_position(text: str, form: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text, form)
    assert str(error.value) == message


def test_a_stage_without_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="^s2>B0 names a stage without a rank$"):
        to_ranks(parse("F0>s1  s2>B0", "stage"), {1: 4})


def test_a_send_and_the_receive_after_it_are_one_exchange() -> None:
    first, second = parse("F0>1  1>B0")
    assert fuse([first, second]) == ((None, first), (first, second), (second, None))
    assert fuse([]) == ((None, None),)
