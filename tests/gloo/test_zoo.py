"""Models of every family as Transformers has them; benchmarks/zoo.py shows all of them on all meshes."""

import pytest

from tests.gloo.outcomes import outcome, trained
from tests.gloo.pool import OneProcess

CASES = [
    ("DeepseekV3ForCausalLM", "3D zero1"),
    ("Qwen2MoeForCausalLM", "dp2"),
    ("MambaForCausalLM", "tp2"),
    ("BertForMultipleChoice", "3D zero3"),
    ("T5ForConditionalGeneration", "pp2"),
    ("WhisperForConditionalGeneration", "pp2"),
    ("Wav2Vec2ForSequenceClassification", "dp2"),
    ("CLIPModel", "3D zero3"),
    ("ResNetForImageClassification", "3D zero1"),
]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_equals_one_device(name: str, mesh: str, threads: OneProcess) -> None:
    assert outcome(trained(threads), name, mesh).startswith("exact")
