"""Batches to train on: (size, generator) -> batch, by kind."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.zoo.entry import CLASSES, IMAGE, VOCABULARY

Batch = dict[str, Any]
Make = Callable[[int, torch.Generator], Batch]
LENGTH, PATCHES, IMAGE_TOKEN = 12, 16, 3


def _tokens(size: int, generator: torch.Generator, low: int = 3) -> torch.Tensor:
    return torch.randint(low, VOCABULARY, (size, LENGTH), generator=generator)


def _classes(size: int, generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(CLASSES, (size, *shape), generator=generator)


def _image(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, 3, IMAGE, IMAGE, generator=generator)


def _causal(size: int, generator: torch.Generator) -> Batch:
    """Labels ignored unevenly, one row without any."""
    tokens = _tokens(size, generator)
    labels = tokens.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    labels[1] = -100
    return {"input_ids": tokens, "labels": labels}


def _masked(size: int, generator: torch.Generator) -> Batch:
    mask = torch.ones(size, LENGTH, dtype=torch.int64)
    mask[1, 7:] = mask[4, 9:] = 0
    return {**_causal(size, generator), "attention_mask": mask}


def _seq2seq_begun(size: int, generator: torch.Generator) -> Batch:
    """Every row has a first label: a decoder starts with the last of them."""
    batch = _causal(size, generator)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    return batch


def _seq2seq_masked(size: int, generator: torch.Generator) -> Batch:
    """Masks that a model makes by itself, but not where it is exported."""
    batch = _masked(size, generator)
    return {**batch, "decoder_attention_mask": torch.ones_like(batch["attention_mask"])}


def _ended_classes(size: int, generator: torch.Generator) -> Batch:
    tokens = _tokens(size, generator)
    tokens[:, -1] = 2
    return {"input_ids": tokens, "labels": _classes(size, generator)}


def _segmentation(size: int, generator: torch.Generator) -> Batch:
    """As many pixels ignored in every image: gradients that are accumulated are those of the mean of the pieces."""
    labels = _classes(size, generator, IMAGE, IMAGE)
    labels[:, :, : IMAGE // 4] = 255
    return {"pixel_values": _image(size, generator), "labels": labels}


def _image_tokens(size: int, generator: torch.Generator) -> Batch:
    """As many tokens as the image has patches stand before the text."""
    text = _tokens(size, generator, low=IMAGE_TOKEN + 1)
    image = torch.full((size, PATCHES), IMAGE_TOKEN)
    labels = torch.cat([torch.full_like(image, -100), text], 1)
    return {"input_ids": torch.cat([image, text], 1), "labels": labels, "pixel_values": _image(size, generator)}


def _layout(size: int, generator: torch.Generator) -> Batch:
    boxes = torch.randint(60, (size, LENGTH, 4), generator=generator).sort(-1).values
    return {"input_ids": _tokens(size, generator), "bbox": boxes, "labels": _classes(size, generator, LENGTH)}


def _made(**makers: Callable[[int, torch.Generator], Any]) -> Make:
    return lambda size, generator: {name: make(size, generator) for name, make in makers.items()}


def _randn(*shape: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda size, generator: torch.randn(size, *shape, generator=generator)


def _rand(*shape: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda size, generator: torch.rand(size, *shape, generator=generator)


def _places(high: int, *shape: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda size, generator: torch.randint(high, (size, *shape), generator=generator)


def _ones(*shape: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda size, generator: torch.ones(size, *shape, dtype=torch.int64)


def _labels(size: int, generator: torch.Generator) -> torch.Tensor:
    return _causal(size, generator)["labels"]  # type: ignore[no-any-return]


BATCHES: Mapping[str, Make] = {
    # text
    "causal": _causal,
    "masked": _masked,
    "seq2seq": _causal,
    "seq2seq_begun": _seq2seq_begun,
    "seq2seq_masked": _seq2seq_masked,
    "classes": _made(input_ids=_tokens, labels=_classes),
    "ended_classes": _ended_classes,
    "token_classes": _made(input_ids=_tokens, labels=_places(CLASSES, LENGTH)),
    "spans": _made(input_ids=_tokens, start_positions=_places(LENGTH + 4), end_positions=_places(LENGTH)),
    "choices": _made(input_ids=_places(VOCABULARY, 3, LENGTH), labels=_places(3)),
    "pretraining": lambda size, generator: {
        **_causal(size, generator), "next_sentence_label": torch.randint(2, (size,), generator=generator)
    },
    # images and videos
    "image": _made(pixel_values=_image, labels=_classes),
    "segmentation": _segmentation,
    "image_and_noise": _made(pixel_values=_image, noise=_rand(PATCHES)),
    "masked_image": _made(
        pixel_values=_image, bool_masked_pos=lambda size, generator: _rand(PATCHES)(size, generator) < 0.5
    ),
    "video": _made(pixel_values=_randn(4, 3, IMAGE, IMAGE), labels=_classes),
    # speech and series
    "waveform": _made(input_values=_randn(80), labels=_classes),
    "waveform_to_text": _made(input_values=_randn(2400), labels=_labels),
    "ctc": _made(input_values=_randn(160), labels=lambda size, generator: _places(19, 5)(size, generator) + 1),
    "speech_to_text": _made(input_features=_randn(8, 24), labels=_labels),
    "features": _made(input_features=_randn(20, 8), labels=_classes),
    "features_to_text": _made(input_features=_randn(40, 8), labels=_labels),
    "spectrogram": _made(input_values=_randn(24, 16), labels=_classes),
    "series": _made(past_values=_randn(24, 2), future_values=_randn(4, 2)),
    # text and images
    "text_and_image": _made(input_ids=_tokens, pixel_values=_image, return_loss=lambda size, generator: True),
    "text_and_mask": _made(input_ids=_tokens, pixel_values=_image, labels=_rand(IMAGE, IMAGE)),
    "caption": lambda size, generator: {**_causal(size, generator), "pixel_values": _image(size, generator)},
    "image_tokens": _image_tokens,
    "layout": _layout,
    "layout_and_image": lambda size, generator: {
        **_layout(size, generator), "pixel_values": _image(size, generator)
    },
    "question": _made(
        input_ids=_tokens, pixel_values=_image, pixel_mask=_ones(IMAGE, IMAGE), labels=_rand(CLASSES)
    ),
    "regions": _made(
        input_ids=_tokens, attention_mask=_ones(LENGTH), visual_embeds=_randn(4, 16), visual_attention_mask=_ones(4),
        labels=_rand(CLASSES),
    ),
}  # fmt: skip
