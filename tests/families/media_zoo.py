"""Tiny random models that see or hear, and what their processors make of text with pictures, video or sound.

`MEDIA` names the families the installed version has; `seeing` builds one, `prompt` makes inputs. Each stands for the
way its family brings media: patches of all pictures in one long tensor with a grid, one row a picture, several tiles
a picture, padded pictures with a mask or with sizes, rows of a picture with break tokens between them, frames of a
video with timestamps between them, sound with a mask. The second picture has another size than the first where that
is possible. Placeholders are ids of `zoo_shared.SHARED`'s vocabulary that no text has.
"""

from __future__ import annotations

from typing import Any

import torch

from . import media_grids, media_pictures
from .media_family import MediaFamily
from .media_items import AUDIO, BREAK, IMAGE, TOKENS, VIDEO, Item, text
from .zoo import configuration, is_known

__all__ = ["AUDIO", "IMAGE", "MEDIA", "VIDEO", "Item", "MediaFamily", "arguments_of", "prompt", "seeing", "with_ids"]

MEDIA: dict[str, MediaFamily] = {
    family.name: family
    for family in (*media_grids.families(), *media_pictures.families())
    if is_known(family.row.model_type, family.row.options)
}


def seeing(name: str, seed: int = 0) -> Any:
    """Builds a family's tiny model, the same for equal arguments, with placeholders in its vocabulary."""
    import transformers

    found = MEDIA[name].row
    config: Any = configuration(found)
    for token, number in TOKENS.items():
        # Qwen2.5-Omni's thinker has the last two in its checkpoints only.
        if getattr(config, token, None) is not None or token.startswith("vision_"):
            setattr(config, token, number)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, found.architecture)(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 and not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.2)  # Gemma 3's projection: no picture would be felt
    model.generation_config.eos_token_id = None
    # A reply with a placeholder in it could not be the start of another turn.
    model.generation_config.suppress_tokens = list(range(IMAGE, BREAK + 3))
    return model


def prompt(
    name: str, config: Any, pictures: list[int], *, before: int = 20, after: int = 12, between: int = 7
) -> dict[str, torch.Tensor]:
    """Returns what a processor makes of text with a picture for each of these seeds.

    Args:
        name: The family.
        config: Its model's.
        pictures: Seeds.
        before: Tokens of text before the first picture.
        after: Tokens of text after the last one, besides ``between``.
        between: Tokens of text after each.
    """
    family = MEDIA[name]
    ids = text(before, 1)
    for number, seed in enumerate(pictures):
        ids += [*family.item(config, number, seed)[1], *text(between, 10 + number)]
    ids += text(after, 2)
    return with_ids(name, torch.tensor([ids]), arguments_of(name, config, pictures))


def arguments_of(name: str, config: Any, pictures: list[int]) -> dict[str, torch.Tensor]:
    """Returns the arguments that carry these pictures."""
    family = MEDIA[name]
    items = [family.item(config, number, seed)[0] for number, seed in enumerate(pictures)]
    found = {key: torch.cat([item[key] for item in items], dim=family.dim) for key in (items[0] if items else ())}
    return {**found, **(family.whole(len(items)) if family.whole and items else {})}


def with_ids(name: str, ids: torch.Tensor, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the arguments of ``generate()`` for these ids and pictures."""
    types = {}
    for key, numbers in MEDIA[name].types.items():
        marks = torch.zeros_like(ids)
        for token, number in numbers.items():
            marks[ids == token] = number
        types[key] = marks
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **arguments}
