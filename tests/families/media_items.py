"""What processors make of one picture, video or sound, for the tiny models of `media_zoo`."""

from __future__ import annotations

from typing import Any

import torch

__all__ = [
    "AUDIO",
    "BREAK",
    "IMAGE",
    "TOKENS",
    "VIDEO",
    "Item",
    "anyres",
    "by_grid",
    "frames",
    "gemma4",
    "joined_tiles",
    "naflex",
    "padded",
    "picture",
    "rows",
    "sound",
    "text",
    "tiles",
    "video",
]

IMAGE, VIDEO, AUDIO, BEGIN, END, HEAR, HEARD, BREAK = 258, 259, 260, 261, 262, 263, 264, 265
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": AUDIO,
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "audio_token_index": AUDIO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
    "image_start_token_id": BEGIN,
    "image_end_token_id": END,
    "video_start_token_id": BEGIN,
    "video_end_token_id": END,
    "boi_token_id": BEGIN,
    "eoi_token_id": END,
    "boa_token_id": HEAR,
    "eoa_token_id": HEARD,
    "boi_token_index": BEGIN,
    "eoi_token_index": END,
    "audio_start_token_id": HEAR,
    "audio_end_token_id": HEARD,
}

Item = tuple[dict[str, torch.Tensor], list[int]]
"""One picture: its arguments, and its tokens."""


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(n: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ------------------------------------------------------------------------------------- pictures

_GRIDS = [(1, 6, 8), (1, 4, 4), (1, 4, 6)]


def _patches(vision: Any, grid: tuple[int, int, int], seed: int) -> torch.Tensor:
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    temporal = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
    return _noise(seed, grid[0] * grid[1] * grid[2], channels * temporal * vision.patch_size**2)


def by_grid(
    config: Any, number: int, seed: int, *, flat: bool = True, sizes: bool = False, newlines: bool = False
) -> Item:
    """Patches in one long tensor, four of them a token; ``newlines``: and tokens after each row and around all."""
    grid = _GRIDS[number % 3]
    pixels = _patches(config.vision_config, grid, seed)
    if not flat:
        patch = config.vision_config.patch_size
        pixels = pixels.reshape(len(pixels), -1, patch, patch)
    more = {"image_merge_sizes": torch.tensor([2])} if sizes else {}
    tokens = [BEGIN, *[IMAGE] * (len(pixels) // 4 + newlines * (grid[1] // 2 + 2)), END]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid]), **more}, tokens


def video(config: Any, number: int, seed: int, *, stamps: bool = False, seconds: str = "") -> Item:
    grid = (2, 4, 4) if number % 2 == 0 else (2, 4, 6)
    frame = grid[1] * grid[2] // 4
    tokens = [BEGIN, *[VIDEO] * (2 * frame), END]
    if stamps:  # Qwen3-VL writes the time before each frame
        tokens = [token for i in range(2) for token in (40 + i, BEGIN, *[VIDEO] * frame, END)]
    arguments = {"pixel_values_videos": _patches(config.vision_config, grid, seed)}
    arguments["video_grid_thw"] = torch.tensor([grid])
    if seconds:
        arguments[seconds] = torch.tensor([0.5 + number])
    return arguments, tokens


def picture(
    config: Any, number: int, seed: int, *, size: int, tokens: int, tiles: int = 1, name: str = "pixel_values"
) -> Item:
    """One row a picture, or one a tile, all tokens in one piece."""
    return {name: _noise(seed, tiles, 3, size, size)}, [BEGIN, *[IMAGE] * (tokens * tiles), END]


def tiles(config: Any, number: int, seed: int, *, size: int, tokens: int) -> Item:
    """Tiles with a token before each; the second picture has one more."""
    tiles = 2 + number % 2
    parts = [token for i in range(tiles) for token in (BREAK + i, *[IMAGE] * tokens)]
    return {"pixel_values": _noise(seed, tiles, 3, size, size)}, [BEGIN, *parts, END]


def joined_tiles(config: Any, number: int, seed: int, *, size: int, tokens: int) -> Item:
    """Tiles without anything between; the second picture has one more."""
    return picture(config, number, seed, size=size, tokens=tokens, tiles=1 + number % 2)


def padded(config: Any, number: int, seed: int, *, size: int, tokens: int, masked: bool = True) -> Item:
    """Idefics: a dimension for the prompts, a mask of the pixels, tiles with a token before each."""
    tiles = 1 + number % 2
    pixels = _noise(seed, 1, tiles, 3, size, size)
    mask = torch.ones(1, tiles, size, size, dtype=torch.long)
    parts = [token for i in range(tiles) for token in (BREAK + i, *[IMAGE] * tokens)]
    return {"pixel_values": pixels, "pixel_attention_mask": mask}, [BEGIN, *parts, END]


def anyres(config: Any, number: int, seed: int, *, side: int, patch: int, extra: int, single: bool = False) -> Item:
    """LLaVA-NeXT: the whole picture and crops of it; a newline after each row, as one piece of tokens."""
    grid = side // patch
    crops = 1 if single else 2
    height, width = side, side * crops
    tokens = grid * grid + (1 if single else grid * (grid * crops + 1)) - (0 if single else extra)
    pixels = _noise(seed, 1, 1 if single else 1 + crops, 3, side, side)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}, [IMAGE] * tokens


def rows(config: Any, number: int, seed: int, *, step: int = 16, largest: tuple[int, int] = (48, 64)) -> Item:
    """Pixtral: padded pictures with their sizes, a break token after each row of patches."""
    height, width = [(48, 64), (32, 32), (32, 64)][number % 3]
    pixels = torch.zeros(1, 3, *largest)
    pixels[:, :, :height, :width] = _noise(seed, 1, 3, height, width)
    line = [*[IMAGE] * (width // step), BREAK]
    tokens = line * (height // step)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}, [*tokens[:-1], END]


def naflex(config: Any, number: int, seed: int) -> Item:
    """LFM2-VL: patches padded to a common number, with a mask and the shape."""
    height, width = [(4, 4), (2, 8), (4, 4)][number % 3]
    n = height * width
    pixels = torch.zeros(1, 16, 3 * config.vision_config.patch_size**2)
    pixels[:, :n] = _noise(seed, 1, n, pixels.shape[-1])
    mask = torch.zeros(1, 16, dtype=torch.long)
    mask[:, :n] = 1
    found = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[height, width]])}
    return found, [BEGIN, *[IMAGE] * (n // 4), END]


def gemma4(config: Any, number: int, seed: int) -> Item:
    """Gemma 4: patches padded to a common number, with the place of each."""
    height, width = [(4, 6), (4, 4), (2, 8)][number % 3]
    n, most = height * width, 24
    pixels = torch.zeros(1, most, 3 * config.vision_config.patch_size**2)
    pixels[:, :n] = torch.rand(1, n, pixels.shape[-1], generator=torch.Generator().manual_seed(seed))
    places = torch.full((1, most, 2), -1)
    places[0, :n] = torch.tensor([(x, y) for y in range(height) for x in range(width)])
    return {"pixel_values": pixels, "image_position_ids": places}, [BEGIN, *[IMAGE] * (n // 4), END]


def frames(config: Any, number: int, seed: int, *, size: int, tokens: int) -> Item:
    """A video of four frames, whose tokens are one piece."""
    return {"pixel_values_videos": _noise(seed, 1, 4, 3, size, size)}, [VIDEO] * tokens


# ------------------------------------------------------------------------------------- sound


def sound(
    config: Any,
    number: int,
    seed: int,
    *,
    bins: int,
    frames: int,
    tokens: int,
    mask: str = "",
    last: bool = False,
    kind: type = int,
) -> Item:
    """Frames of a spectrogram, all of them real."""
    shape = (1, frames, bins) if last else (1, bins, frames)
    arguments = {"input_features": _noise(seed, *shape)}
    if mask:
        arguments[mask] = torch.ones(1, frames, dtype=torch.bool if kind is bool else torch.long)
    return arguments, [HEAR, *[AUDIO] * tokens, HEARD]
