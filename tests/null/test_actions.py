"""The text of schedules."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.runtime.actions import Action, forwards, fuse, parse, render, to_ranks

numbers = st.integers(0, 20)
peers = st.lists(numbers, max_size=3, unique=True).map(tuple)
stages = st.none() | numbers
actions = (
    st.builds(Action, kind=st.sampled_from("FBI"), microbatch=numbers, stage=stages, receives=peers, sends=peers)
    | st.builds(Action, kind=st.just("W"), microbatch=numbers, stage=stages)
    | st.builds(
        Action,
        kind=st.sampled_from("FBI"),
        microbatch=numbers,
        stage=stages,
        receives=peers.filter(bool),
        runs=st.just(False),
    )
)


@settings(deadline=None)
@given(st.lists(actions).map(tuple), st.sampled_from(["rank", "stage"]))
def test_there_and_back(row: tuple[Action, ...], form: Any) -> None:
    assert parse(render(row, form), form) == row


def test_several_peers_have_commas() -> None:
    (action,) = parse("0,1>F2>3")
    assert action == Action(kind="F", microbatch=2, receives=(0, 1), sends=(3,))
    assert render([action], "stage") == "s0,s1>F2>s3"


def test_a_rank_of_several_stages_names_them() -> None:
    early, forward, inputs, weights = parse("s0>[1F3]  1F3>s2  s2>1I3  1W3", "stage")
    assert early == Action(kind="F", stage=1, microbatch=3, receives=(0,), runs=False)
    assert forward == Action(kind="F", stage=1, microbatch=3, sends=(2,))
    assert inputs == Action(kind="I", stage=1, microbatch=3, receives=(2,))
    assert weights == Action(kind="W", stage=1, microbatch=3)
    assert weights.name == "1W3"


@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        ("F0>2  G1", "rank", "'G1' at position 6 is no action with ranks as peers, as in 0,1>F2>3"),
        ("F0>s1", "rank", "'F0>s1' at position 0 is no action with ranks as peers, as in 0,1>F2>3"),
        ("F0>1", "stage", "'F0>1' at position 0 is no action with stages as peers, as in s0,s1>F2>s3"),
        ("F0 > 1", "rank", "'>' at position 3 is no action with ranks as peers, as in 0,1>F2>3"),
        ("F01", "rank", "'F01' at position 0 is no action with ranks as peers, as in 0,1>F2>3"),
        ("[F0>1", "rank", "'[F0>1' at position 0 is no action with ranks as peers, as in 0,1>F2>3"),
        ("[F0]", "rank", "'[F0]' at position 0: [F0] stands for messages alone and either receives or sends"),
        ("1>[F0]>2", "rank", "'1>[F0]>2' at position 0: [F0] stands for messages alone and either receives or sends"),
        ("1>2W0", "rank", "'1>2W0' at position 0: 2W0 receives from 1: a backward for the weights has no messages"),
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


def test_an_evaluation_runs_the_forwards_alone() -> None:
    row = parse("s0>[1F1]  s0>1F0>s2  s2>1I0  1F1>s2  1W0", "stage")
    assert render(forwards(row), "stage") == "s0>[1F1]  s0>1F0>s2  1F1>s2"


def test_a_send_and_the_receive_after_it_are_one_exchange() -> None:
    first, second = parse("F0>1  1>B0")
    assert fuse([first, second]) == ((None, first), (first, second), (second, None))
    assert fuse([]) == ((None, None),)
