"""Models of every family as Transformers has them; benchmarks/zoo.py shows all of them on all meshes."""

import pytest

from tests.gloo.outcomes import outcome
from tests.gloo.pool import OneProcess

CASES = [
    ("Qwen2ForCausalLM", "3D zero1"),
    ("MixtralForCausalLM", "dp2"),
    ("MambaForCausalLM", "tp2"),
    ("BertForMaskedLM", "3D zero3"),
    ("T5ForConditionalGeneration", "pp2"),
    ("BartForConditionalGeneration", "3D zero1"),
    ("ViTForImageClassification", "3D zero3"),
    ("SwinForImageClassification", "dp2"),
    ("WhisperForConditionalGeneration", "tp2"),
    ("Wav2Vec2ForSequenceClassification", "dp2"),
    ("CLIPModel", "tp2"),
    ("ResNetForImageClassification", "3D zero1"),
]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_equals_one_device(name: str, mesh: str, threads: OneProcess) -> None:
    assert outcome(threads, name, mesh).startswith("exact")
