"""How a family that sees or hears is described, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvembed.hf._compat import is_before

from .media_items import AUDIO, IMAGE, VIDEO, Item
from .zoo_shared import Row, Sub, row

__all__ = ["CLIP", "LLAMA", "MM", "MROPE", "MROPE_HALF", "QWEN_VISION", "SIGLIP", "TWO_LAYERS", "MediaFamily", "qwen"]


@dataclass(frozen=True)
class MediaFamily:
    """A family, and how it brings one kind of media.

    Args:
        name: transformers' model type, and a variant.
        row: How the model is built.
        item: Makes one picture from the model's config, its number in the prompt and a seed.
        dim: The dimension along which several are put together.
        types: Arguments that mark media tokens, with the number each placeholder gets.
        whole: Arguments that depend on how many pictures there are, made from that number.
        refused: Why calls pass through (a part of the reason); empty where they are served.
    """

    name: str
    row: Row
    item: Callable[[Any, int, int], Item]
    dim: int = 0
    types: dict[str, dict[int, int]] = field(default_factory=dict)
    whole: Callable[[int], dict[str, torch.Tensor]] | None = None
    refused: str = ""


MROPE_HALF = {  # half of each head is rotated
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
SIGLIP = Sub("siglip_vision_model", {"image_size": 28, "patch_size": 14})
CLIP = Sub("clip_vision_model", {"image_size": 28, "patch_size": 14, "projection_dim": 32})
QWEN_VISION = {"depth": 1, "out_hidden_size": 64, "patch_size": 4}
MM = {"mm_token_type_ids": {IMAGE: 1, VIDEO: 2, AUDIO: 3}}
LLAMA = Sub("llama")
TWO_LAYERS: dict[str, Any] = {"vision_feature_layers" if is_before((5, 23)) else "vision_feature_layer": [-1, -2]}


def qwen(name: str, model: str, text: Sub, vision: Sub, **options: Any) -> Row:
    """Return a row of one of the many families that are built like Qwen-VL."""
    return row(name.split("-")[0], model=model, text_config=text, vision_config=vision, **options)
