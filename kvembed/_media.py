"""Pictures, video and sound in a prompt: what they are to the key chain, and which part of them a suffix needs.

A prompt with media holds placeholder tokens, the same for every picture. For the key chain (and nowhere else) they
are replaced by *content ids*: negative numbers made from a digest of the picture. So another picture is another
prefix, and keys, token comparison, live sequences and tails need to know nothing of media. SGLang replaces
placeholders in its radix tree by a hash of the image for the same reason.

A picture is indivisible: its tokens may attend to one another in both directions, and its features are computed
from all of it. A prefix ends before or after one, never inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np
import torch

from kvembed._keys import as_token_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvembed._keys import TokenIds
    from kvembed._media_trial import MediaVerdict

__all__ = ["MEDIA_ARGUMENTS", "TYPE_ARGUMENTS", "Media", "MediaError", "has_media", "read_media"]

_KINDS: dict[str, tuple[str, ...]] = {
    "image": (
        "pixel_values",
        "pixel_values_images",
        "high_res_pixel_values",
        "pixel_values_local",
        "num_local_patches",
        "pixel_attention_mask",
        "pixel_mask",
        "image_grid_thw",
        "image_merge_sizes",
        "image_position_ids",
        "image_sizes",
        "batch_num_images",
        "spatial_shapes",
    ),
    "video": (
        "pixel_values_videos",
        "video_grid_thw",
        "video_merge_sizes",
        "video_compression_mask",
        "video_position_ids",
        "num_frames_per_video",
        "second_per_grid_ts",
        "video_second_per_grid",
        "image_sizes_videos",
    ),
    "audio": (
        "input_features",
        "input_features_mask",
        "feature_attention_mask",
        "audio_feature_lengths",
        "input_values",
        "input_values_mask",
        "audio_values",
    ),
}

_WHOLE = frozenset({"batch_num_images"})
"""Arguments about a prompt rather than a picture: they go with each as they are."""

MEDIA_ARGUMENTS = frozenset(name for names in _KINDS.values() for name in names)
"""Arguments of ``generate()`` that carry media, in transformers' models."""

TYPE_ARGUMENTS = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Arguments as long as the prompt that mark which tokens are media."""

_LEAST_TOKENS = 4
"""Content ids have 31 bits each: four of them make two different pictures as unlikely to be taken for one another as
128-bit digests do."""


class MediaError(Exception):
    """This prompt's media cannot be told apart from others'; the text says why."""


@dataclass(frozen=True)
class _Unit:
    """Media that is reused as a whole: placeholder tokens from ``start`` to ``end``, and the items they stand for."""

    start: int
    end: int
    items: tuple[tuple[str, int], ...]
    """Kind and number within its kind of each."""


@dataclass(frozen=True)
class Media:
    """The media of one prompt.

    Args:
        ids: The prompt's ids with content ids in place of placeholders.
        units: Where its media lie, in order, apart from each other.
        arguments: The caller's media arguments.
        counts: For each kind, how many items its arguments can be taken apart into; None where they cannot.
        types: The caller's arguments that mark which tokens are media.
        follows: Whether the model was found to go on right with text on top of cached media.
        resumes: Whether it was found to compute media right on top of cached text.
        between: The same on top of cached media.
    """

    ids: TokenIds
    units: tuple[_Unit, ...]
    arguments: Mapping[str, Any]
    counts: Mapping[str, int | None] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)
    follows: bool = False
    resumes: bool = False
    between: bool = False

    @property
    def start(self) -> int:
        """Position of the first media token."""
        return self.units[0].start

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.units[-1].end

    @property
    def is_divisible(self) -> bool:
        """Whether arguments for some of the units can be made from those for all."""
        return len(self.units) == 1 or all(count is not None for count in self.counts.values())

    def judged(self, verdict: MediaVerdict) -> Media:
        """Return the same media with what is known of the model."""
        return replace(
            self, follows=bool(verdict.follows), resumes=bool(verdict.resumes), between=bool(verdict.between)
        )

    @property
    def signature(self) -> str:
        """What kind of call this is: what was found of one such call holds for others."""
        return " ".join(sorted([*self.arguments, *self.types]))

    def floor(self, position: int) -> int:
        """Return the last position up to ``position`` where a reused prefix may end."""
        if position >= self.end:
            if self.follows:
                return position
            position = self.end - 1
        if position > self.start and self.follows and self.between and self.is_divisible:
            return next((unit.start for unit in self.units if unit.start < position < unit.end), position)
        return min(position, self.start) if self.resumes else 0

    def part(self, start: int, end: int) -> dict[str, Any]:
        """Return the media arguments for the tokens from ``start`` to ``end``: None where none of a kind are left.

        Args:
            start: A position that `floor` gives.
            end: Another, after it.
        """
        wanted = [item for unit in self.units if unit.start >= start and unit.end <= end for item in unit.items]
        found: dict[str, Any] = {}
        for kind, names in _KINDS.items():
            numbers = [number for of, number in wanted if of == kind]
            for name in names:
                value = self.arguments.get(name)
                if value is None:
                    continue
                if not numbers:
                    found[name] = None
                elif name in _WHOLE or len(numbers) == self.counts.get(kind) or self.counts.get(kind) is None:
                    found[name] = value
                else:
                    found[name] = _rows_of(kind, name, value, self.arguments, numbers)
        return found


def has_media(kwargs: Mapping[str, Any]) -> bool:
    """True when a call of ``generate()`` brings media."""
    return any(kwargs.get(name) is not None for name in MEDIA_ARGUMENTS)


def read_media(config: Any, ids: TokenIds, kwargs: Mapping[str, Any]) -> Media:
    """Find the media of a prompt and digest them.

    Args:
        config: The model's config, which says what its placeholder tokens are.
        ids: The prompt.
        kwargs: The arguments of ``generate()``.

    Raises:
        MediaError: They cannot be found by their placeholders, or cannot be compared.
    """
    arguments = {n: kwargs[n] for n in sorted(MEDIA_ARGUMENTS) if kwargs.get(n) is not None}
    types = {n: kwargs[n] for n in sorted(TYPE_ARGUMENTS) if kwargs.get(n) is not None}
    for name, value in (*arguments.items(), *types.items()):
        _check_readable(name, value)
    kinds = [kind for kind, names in _KINDS.items() if any(name in arguments for name in names)]
    at: dict[str, np.ndarray] = {}
    for kind in kinds:
        at[kind] = np.flatnonzero(np.isin(ids, _placeholders(config, kind)))
        if not len(at[kind]):
            raise MediaError(f"{kind} without placeholder tokens in the prompt")
    is_media = np.zeros(len(ids), dtype=bool)
    for positions in at.values():
        if is_media[positions].any():
            raise MediaError("the same placeholder tokens for two kinds of media")
        is_media[positions] = True
    for name, value in types.items():
        if not isinstance(value, torch.Tensor) or value.shape != (1, len(ids)):
            raise MediaError(f"{name} of another shape than input_ids")
        if bool((value.cpu().numpy()[0] != 0)[~is_media].any()):
            raise MediaError(f"{name} marks other tokens than those of media")
    counts: dict[str, int | None] = {}
    spans: list[tuple[int, int, tuple[str, int]]] = []
    for kind in kinds:
        lengths = _tokens_of_items(config, kind, arguments, at[kind])
        counts[kind] = None if lengths is None else len(lengths)
        ends = np.cumsum([len(at[kind])] if lengths is None else lengths)
        for number, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            spans.append((int(at[kind][first]), int(at[kind][last - 1]) + 1, (kind, number)))
    units = _units(sorted(spans), is_media)
    own = _with_content_ids(ids, units, is_media, arguments, types, counts)
    return Media(own, units, arguments, counts, types)


def _check_readable(name: str, value: Any) -> None:
    """Refuse tensors without bytes to compare, and numbers that a trial of the model could tell nothing from."""
    if isinstance(value, list | tuple):
        for part in value:
            _check_readable(name, part)
    if not isinstance(value, torch.Tensor):
        return
    if value.device.type == "meta":
        raise MediaError(f"{name} is on the meta device and holds nothing")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_complex():
        raise MediaError(f"{name} is not a plain tensor of numbers")
    if value.is_floating_point() and not bool(value.float().isfinite().all()):
        raise MediaError(f"{name} holds values that are not finite numbers")


def _placeholders(config: Any, kind: str) -> list[int]:
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return [value for name in names if isinstance(value := getattr(config, name, None), int)]


def _tokens_of_items(config: Any, kind: str, arguments: Mapping[str, Any], at: np.ndarray) -> list[int] | None:
    """Return how many tokens each item of a kind has, or None when its arguments cannot be taken apart."""
    values = {name: arguments[name] for name in _KINDS[kind] if name in arguments and name not in _WHOLE}
    if not values or not all(isinstance(value, torch.Tensor) for value in values.values()):
        return None
    grid = values.get(f"{kind}_grid_thw")
    if grid is not None:
        return _tokens_by_grid(config, grid, values, at, _KINDS[kind][0])
    dim = _dimension_of_items(kind, arguments)
    counts = {value.shape[dim] if value.ndim > dim else -1 for value in values.values()}
    if len(counts) != 1:
        return None
    count = counts.pop()
    main, *others = values.values()
    # What tells how large each item is: without it, or where all are alike, so are their numbers of tokens.
    alike = all(bool((value == value.narrow(dim, 0, 1)).all()) for value in others) if count > 0 else False
    runs = [len(run) for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)]
    if len(runs) == count and (not alike or len(set(runs)) == 1):
        return runs
    if alike:
        return [len(at) // count] * count if len(at) % count == 0 else None
    if others and values.get("image_sizes") is not None and main.ndim == 4:
        return _tokens_by_area(values["image_sizes"], len(at))  # Pixtral, with a break after each row of patches
    return None


def _tokens_by_area(sizes: torch.Tensor, tokens: int) -> list[int] | None:
    """The same where a token stands for a square of pixels."""
    areas = [int(height) * int(width) for height, width in sizes.tolist()] if sizes.shape[1:] == (2,) else []
    square, rest = divmod(sum(areas), tokens)
    if rest or not square or math.isqrt(square) ** 2 != square or any(area % square for area in areas):
        return None
    return [area // square for area in areas]


def _tokens_by_grid(
    config: Any, grid: torch.Tensor, values: Mapping[str, Any], at: np.ndarray, pixels: str
) -> list[int] | None:
    """The same where the patches of all items lie in one long tensor, and a grid tells how many each has."""
    if values.keys() - {pixels, "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "video_second_per_grid"}:
        return None
    if pixels not in values or grid.ndim != 2 or not len(grid):
        return None
    if any(len(value) != len(grid) for name, value in values.items() if name != pixels):
        return None
    patches = [int(n) for n in grid.prod(dim=-1).tolist()]
    merged, rest = divmod(sum(patches), len(at))
    side = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    if rest or not merged or (side is not None and merged != side**2) or any(n % merged for n in patches):
        return None
    return [n // merged for n in patches] if values[pixels].shape[0] == sum(patches) else None


def _dimension_of_items(kind: str, arguments: Mapping[str, Any]) -> int:
    """Return the dimension that numbers the items: SmolVLM's come after a dimension for the prompts."""
    pixels = next(arguments[name] for name in _KINDS[kind] if name in arguments)
    sizes = arguments.get("image_sizes")  # LLaVA-NeXT's one picture in several crops
    return 1 if pixels.ndim == 5 and pixels.shape[0] == 1 and sizes is None else 0


def _rows_of(kind: str, name: str, value: torch.Tensor, arguments: Mapping[str, Any], numbers: Sequence[int]) -> Any:
    """Return the part of one argument that belongs to the items with these numbers."""
    grid = arguments.get(f"{kind}_grid_thw")
    if grid is not None and name == _KINDS[kind][0]:
        ends = [0, *grid.prod(dim=-1).cumsum(dim=0).tolist()]
        return torch.cat([value[int(ends[n]) : int(ends[n + 1])] for n in numbers])
    dim = 0 if grid is not None else _dimension_of_items(kind, arguments)
    return value.index_select(dim, torch.tensor(list(numbers), device=value.device))


def _units(spans: list[tuple[int, int, tuple[str, int]]], is_media: np.ndarray) -> tuple[_Unit, ...]:
    """Join items whose tokens touch or interleave: they may attend to one another."""
    units: list[_Unit] = []
    for start, end, item in spans:
        if units and (start < units[-1].end or (start == units[-1].end and is_media[start - 1])):
            last = units[-1]
            units[-1] = _Unit(last.start, max(last.end, end), (*last.items, item))
        else:
            units.append(_Unit(start, end, (item,)))
    return tuple(units)


def _with_content_ids(
    ids: TokenIds,
    units: Sequence[_Unit],
    is_media: np.ndarray,
    arguments: Mapping[str, Any],
    types: Mapping[str, Any],
    counts: Mapping[str, int | None],
) -> TokenIds:
    own = ids.copy()
    for unit in units:
        digest = blake3.blake3(b"kvembed/media/1")
        for kind, number in unit.items:
            for name in _KINDS[kind]:
                if name in arguments:
                    value = arguments[name]
                    whole = counts[kind] is None or name in _WHOLE
                    _digest(digest, name, value if whole else _rows_of(kind, name, value, arguments, [number]))
        for name, value in types.items():
            _digest(digest, name, value[:, unit.start : unit.end])
        positions = unit.start + np.flatnonzero(is_media[unit.start : unit.end])
        if len(positions) < _LEAST_TOKENS:
            raise MediaError(f"media of fewer than {_LEAST_TOKENS} tokens")
        digest.update(ids[positions].tobytes())  # an image token is another thing than a video token
        words = np.frombuffer(digest.digest(length=4 * len(positions)), dtype="<u4").astype(np.int64)
        # From -2 down: -1 stands for a snapshot of state.
        own[positions] = -2 - words % ((1 << 31) - 2)
    return as_token_ids(own)


def _digest(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"{name}:{data.dtype}:{tuple(data.shape)};".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b"")
    elif isinstance(value, list | tuple):
        digest.update(f"{name}:{len(value)};".encode())
        for part in value:
            _digest(digest, "", part)
    elif isinstance(value, bool | int | float | str):
        digest.update(f"{name}:{type(value).__name__}:{value!r};".encode())
    else:
        raise MediaError(f"{name} is of a kind that has no digest: {type(value).__name__}")
