"""Content ids, units and parts: what `_media` makes of a prompt's arguments, also of hostile ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvembed._keys import as_token_ids
from kvembed._media import Media, MediaError, has_media, read_media
from kvembed._media_trial import MediaVerdict

IMAGE, VIDEO, AUDIO = 900, 901, 902
CONFIG = SimpleNamespace(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    audio_token_index=AUDIO,
    vision_config=SimpleNamespace(spatial_merge_size=2),
)
ALL = MediaVerdict(True, True, True)


def ids_of(*parts: int | tuple[int, int]) -> np.ndarray:
    """Text of so many tokens, or (placeholder, how many)."""
    out: list[int] = []
    for part in parts:
        out += [part[0]] * part[1] if isinstance(part, tuple) else list(range(1, part + 1))
    return as_token_ids(out)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(*sizes: tuple[int, int, int], seed: int = 0) -> dict[str, Any]:
    pixels = [noise(seed + i, t * h * w, 6) for i, (t, h, w) in enumerate(sizes)]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(sizes)}


def spans(media: Media) -> list[tuple[int, int]]:
    return [(unit.start, unit.end) for unit in media.units]


TWO = ids_of(5, (IMAGE, 12), 3, (IMAGE, 4), 6)  # 5..17 and 20..24 of 30
TWO_GRIDS = grid((1, 6, 8), (1, 4, 4))


def test_only_placeholders_get_content_ids() -> None:
    media = read_media(CONFIG, TWO, TWO_GRIDS)
    assert spans(media) == [(5, 17), (20, 24)]
    changed = media.ids != TWO
    assert changed.tolist() == (TWO == IMAGE).tolist()
    assert (media.ids[changed] < -1).all()  # -1 stands for a snapshot
    assert len(set(media.ids[5:17].tolist())) == 12
    assert np.array_equal(media.ids, read_media(CONFIG, TWO, TWO_GRIDS).ids)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["pixel_values"].__setitem__((0, 0), 9.0),
        lambda a: a.update(pixel_values=a["pixel_values"].bfloat16()),
        lambda a: a.update(pixel_values=a["pixel_values"].double()),
        lambda a: a.update(image_grid_thw=a["image_grid_thw"].int()),
        lambda a: a.update(image_grid_thw=torch.tensor([[1, 8, 6], [1, 4, 4]])),  # as many patches, other positions
        lambda a: a.update(pixel_values=a["pixel_values"].reshape(64, 2, 3)),
        lambda a: a.update(mm_token_type_ids=torch.tensor(TWO == IMAGE).long()[None]),
        lambda a: a.update(mm_token_type_ids=2 * torch.tensor(TWO == IMAGE).long()[None]),
        lambda a: a.update(image_sizes=torch.tensor([[6, 8], [4, 4]])),
        lambda a: a.update(second_per_grid_ts=None, image_position_ids=torch.zeros(2, 3)),
    ],
)
def test_whatever_may_change_the_features_changes_the_ids(change: Any) -> None:
    arguments = {name: value.clone() for name, value in TWO_GRIDS.items()}
    before = read_media(CONFIG, TWO, arguments).ids
    change(arguments)
    after = read_media(CONFIG, TWO, arguments).ids
    assert (before[5:17] != after[5:17]).all()


def test_each_picture_has_its_own_digest() -> None:
    before = read_media(CONFIG, TWO, TWO_GRIDS).ids
    other = {**TWO_GRIDS, "pixel_values": torch.cat([TWO_GRIDS["pixel_values"][:48], noise(7, 16, 6)])}
    after = read_media(CONFIG, TWO, other).ids
    assert np.array_equal(before[:20], after[:20])
    assert (before[20:24] != after[20:24]).all()
    # The same two pictures in the other order are none of the first ones.
    same = ids_of(5, (IMAGE, 4), 3, (IMAGE, 4), 6)
    ab, ba = grid((1, 4, 4), (1, 4, 4)), grid((1, 4, 4), (1, 4, 4))
    ba["pixel_values"] = ba["pixel_values"].roll(16, 0)
    a, b = read_media(CONFIG, same, ab).ids, read_media(CONFIG, same, ba).ids
    assert (a[5:9] != b[5:9]).all()
    assert np.array_equal(a[5:9], b[12:16])  # one picture is the same to the chain wherever it stands


def test_an_image_is_no_video() -> None:
    pixels, sizes = noise(1, 16, 6), torch.tensor([[1, 4, 4]])
    image = read_media(CONFIG, ids_of(2, (IMAGE, 4), 2), {"pixel_values": pixels, "image_grid_thw": sizes})
    video = read_media(CONFIG, ids_of(2, (VIDEO, 4), 2), {"pixel_values_videos": pixels, "video_grid_thw": sizes})
    assert (image.ids[2:6] != video.ids[2:6]).all()


def test_floor_never_ends_inside_a_picture() -> None:
    media = read_media(CONFIG, TWO, TWO_GRIDS).judged(ALL)
    expected = [*range(6), *[5] * 11, *range(17, 21), *[20] * 3, *range(24, 31)]
    assert [media.floor(position) for position in range(31)] == expected


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (MediaVerdict(), {4: 0, 17: 0, 24: 0, 30: 0}),
        (MediaVerdict(resumes=True), {4: 4, 9: 5, 18: 5, 24: 5, 30: 5}),
        (MediaVerdict(follows=True), {4: 0, 18: 0, 24: 24, 30: 30}),
        (MediaVerdict(follows=True, resumes=True), {4: 4, 18: 5, 22: 5, 24: 24, 27: 27}),
        (MediaVerdict(follows=True, between=True), {4: 0, 5: 0, 9: 5, 18: 18, 22: 20, 24: 24}),
        (MediaVerdict(resumes=True, between=True), {4: 4, 18: 5, 24: 5, 30: 5}),
    ],
)
def test_floor_uses_only_what_was_found(verdict: MediaVerdict, expected: dict[int, int]) -> None:
    media = read_media(CONFIG, TWO, TWO_GRIDS).judged(verdict)
    assert {position: media.floor(position) for position in expected} == expected


def test_floor_of_what_cannot_be_taken_apart() -> None:
    arguments = {**TWO_GRIDS, "image_sizes": torch.tensor([[1, 2]])}  # one row for two pictures
    media = read_media(CONFIG, TWO, arguments).judged(ALL)
    assert spans(media) == [(5, 24)]
    assert [media.floor(position) for position in (4, 5, 17, 19, 23, 24)] == [4, 5, 5, 5, 5, 24]
    assert media.part(5, 30).keys() == arguments.keys()


def test_part_gives_only_what_a_suffix_holds() -> None:
    media = read_media(CONFIG, TWO, TWO_GRIDS)
    pixels = TWO_GRIDS["pixel_values"]
    assert media.part(0, 30)["pixel_values"] is pixels
    last = media.part(20, 30)
    assert torch.equal(last["pixel_values"], pixels[48:])
    assert last["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert torch.equal(media.part(0, 20)["pixel_values"], pixels[:48])
    assert media.part(24, 30) == {"pixel_values": None, "image_grid_thw": None}
    assert media.part(0, 5) == {"pixel_values": None, "image_grid_thw": None}


def test_two_kinds_in_one_prompt() -> None:
    ids = ids_of(3, (AUDIO, 5), 2, (IMAGE, 4), 2, (AUDIO, 5), 2)
    sound = {"input_features": noise(1, 2, 8, 20), "input_features_mask": torch.ones(2, 20)}
    media = read_media(CONFIG, ids, {**grid((1, 4, 4)), **sound}).judged(ALL)
    assert spans(media) == [(3, 8), (10, 14), (16, 21)]
    rest = media.part(14, len(ids))
    assert rest["pixel_values"] is None
    assert torch.equal(rest["input_features"], sound["input_features"][1:])
    assert rest["input_features_mask"].shape == (1, 20)
    other = {**sound, "input_features": sound["input_features"].flip(0)}
    after = read_media(CONFIG, ids, {**grid((1, 4, 4)), **other})
    assert (media.ids[3:8] != after.ids[3:8]).all()
    assert np.array_equal(media.ids[10:14], after.ids[10:14])


def test_pictures_that_touch_are_one() -> None:
    media = read_media(CONFIG, ids_of(2, (IMAGE, 8), 2), grid((1, 4, 4), (1, 4, 4)))
    assert spans(media) == [(2, 10)]
    assert media.judged(ALL).floor(6) == 2


def test_tiles_of_a_picture() -> None:
    # Three tiles without anything between, then one: rows are tiles, not pictures.
    joined = read_media(CONFIG, ids_of(2, (IMAGE, 12), 2, (IMAGE, 4), 2), {"pixel_values": noise(1, 4, 3, 2, 2)})
    assert spans(joined) == [(2, 14), (16, 20)]
    assert joined.part(14, 22)["pixel_values"].shape[0] == 1
    # As many rows as pieces, but pieces of other lengths: nothing says which rows belong to which.
    odd = read_media(CONFIG, ids_of(2, (IMAGE, 12), 2, (IMAGE, 4), 2), {"pixel_values": noise(1, 2, 3, 2, 2)})
    assert spans(odd) == [(2, 20)]


def test_rows_of_a_padded_picture() -> None:
    # Pixtral: a break after each row of patches; 3 rows of 4, then 1 row of 4. Halves would be wrong.
    ids = ids_of(2, (IMAGE, 4), 1, (IMAGE, 4), 1, (IMAGE, 4), 2, (IMAGE, 4), 2)
    arguments = {"pixel_values": noise(1, 2, 3, 48, 64), "image_sizes": torch.tensor([[48, 64], [16, 64]])}
    media = read_media(CONFIG, ids, arguments)
    assert spans(media) == [(2, 16), (18, 22)]
    assert media.judged(ALL).floor(10) == 2
    # Sizes that do not give the tokens: all or nothing.
    arguments["image_sizes"] = torch.tensor([[48, 64], [17, 64]])
    assert spans(read_media(CONFIG, ids, arguments)) == [(2, 22)]


def test_a_grid_that_does_not_give_the_tokens_is_not_taken_apart() -> None:
    for sizes in (((1, 6, 8), (1, 4, 8)), ((1, 3, 8), (1, 3, 8))):
        media = read_media(CONFIG, ids_of(5, (IMAGE, 12), 3, (IMAGE, 4), 6), grid(*sizes))
        assert spans(media) == [(5, 24)]
    short = {**TWO_GRIDS, "pixel_values": TWO_GRIDS["pixel_values"][:-1]}
    assert spans(read_media(CONFIG, TWO, short)) == [(5, 24)]
    flat = {**TWO_GRIDS, "image_grid_thw": torch.tensor([1, 6, 8])}
    assert spans(read_media(CONFIG, TWO, flat)) == [(5, 24)]
    none = {**TWO_GRIDS, "image_grid_thw": torch.empty(0, 3, dtype=torch.long)}
    assert spans(read_media(CONFIG, TWO, none)) == [(5, 24)]


def test_a_number_of_pictures_goes_along_whole() -> None:
    ids = ids_of(2, (IMAGE, 4), 2, (IMAGE, 4), 2)
    arguments = {"pixel_values": noise(1, 2, 3, 2, 2), "batch_num_images": torch.tensor([2])}
    media = read_media(CONFIG, ids, arguments)
    assert media.part(8, 12)["batch_num_images"].tolist() == [2]
    other = read_media(CONFIG, ids, {**arguments, "batch_num_images": torch.tensor([1])})
    assert (media.ids[2:6] != other.ids[2:6]).all()


def test_lists_are_digested_and_not_taken_apart() -> None:
    parts = list(TWO_GRIDS["pixel_values"].split([48, 16]))
    media = read_media(CONFIG, TWO, {**TWO_GRIDS, "pixel_values": parts})
    assert spans(media) == [(5, 24)]
    other = read_media(CONFIG, TWO, {**TWO_GRIDS, "pixel_values": parts[::-1]})
    assert (media.ids[5:17] != other.ids[5:17]).all()


_PIXELS = {"pixel_values": noise(1, 1, 3, 2, 2)}


@pytest.mark.parametrize(
    ("ids", "arguments", "reason"),
    [
        (ids_of(9), _PIXELS, "image without placeholder"),
        (ids_of(3, (VIDEO, 4), 3), _PIXELS, "image without placeholder"),
        (ids_of(3, (IMAGE, 3), 3), _PIXELS, "fewer than 4"),
        (ids_of(3, (IMAGE, 4), 3), {"pixel_values": np.zeros(3)}, "no digest"),
        (ids_of(3, (IMAGE, 4), 3), {"pixel_values": {"a": 1}}, "no digest"),
        (ids_of(3, (IMAGE, 4), 3), {"pixel_values": [object()]}, "no digest"),
        (ids_of(3, (IMAGE, 4), 3), {**_PIXELS, "mm_token_type_ids": torch.ones(1, 10)}, "marks other tokens"),
        (ids_of(3, (IMAGE, 4), 3), {**_PIXELS, "token_type_ids": torch.zeros(1, 9)}, "another shape"),
        (ids_of(3, (IMAGE, 4), 3), {**_PIXELS, "token_type_ids": torch.zeros(2, 10)}, "another shape"),
        (ids_of(3, (IMAGE, 4), 3), {**_PIXELS, "token_type_ids": [[0] * 10]}, "another shape"),
    ],
)
def test_what_cannot_be_told_apart(ids: np.ndarray, arguments: dict[str, Any], reason: str) -> None:
    assert has_media(arguments)
    with pytest.raises(MediaError, match=reason):
        read_media(CONFIG, ids, arguments)


def test_one_placeholder_for_two_kinds() -> None:
    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=IMAGE)
    arguments = {**_PIXELS, "pixel_values_videos": noise(2, 1, 3, 2, 2)}
    with pytest.raises(MediaError, match="two kinds"):
        read_media(config, ids_of(3, (IMAGE, 8), 3), arguments)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 2, 2), (1, 0), ()])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    media = read_media(CONFIG, ids_of(3, (IMAGE, 4), 3), {"pixel_values": torch.zeros(shape)})
    assert spans(media) == [(3, 7)]
    assert media.judged(ALL).floor(5) == 3
    assert media.part(3, 10)["pixel_values"].shape == shape
