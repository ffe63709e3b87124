"""Models of every family as Transformers has them; benchmarks/zoo.py shows all of them on all meshes."""

import pytest

from tests.gloo.outcomes import outcome
from tests.gloo.pool import Pool

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
]


@pytest.mark.gloo
@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_equals_one_device(name: str, mesh: str, pool: Pool) -> None:
    assert outcome(pool, name, mesh).startswith("exact")


@pytest.mark.gloo
def test_batch_statistics_are_refused_by_name(pool: Pool) -> None:
    assert "num_batches_tracked" in outcome(pool, "ResNetForImageClassification", "dp2")
