"""Vision models: text is served, also after a picture; and so are prompts with pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from kvembed import CachedModel, KVStore, PromptError

from .zoo import FAMILIES, build

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 16
PICTURE = 258  # the placeholder's id, which no text has


def _generate(model: Any, ids: torch.Tensor) -> list[int]:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_text_after_a_picture(name: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 250, (1, 3 * BLOCK + 4), generator=torch.Generator().manual_seed(0))
    expected = _generate(build(name), ids)
    model = build(name)
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for _ in range(2):
            # What generating with an image leaves behind: later positions would be off by this.
            model.model.rope_deltas = torch.tensor([[-7]])
            assert _generate(cached, ids) == expected
        assert cached.usage.cached_tokens == 3 * BLOCK + 3
        cached.close()


def seeing(name: str) -> Any:
    """Build a vision model of the zoo whose placeholder is in its vocabulary."""
    config: Any = FAMILIES[name].config()
    config.image_token_id = PICTURE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, config.architectures[0])(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(model: Any, pictures: list[int], *, before: int = 20, after: int = 35) -> dict[str, torch.Tensor]:
    """Return what a processor makes of text with a picture for each of these seeds."""
    vision, grid = model.config.vision_config, (1, 6, 8)
    patches = grid[0] * grid[1] * grid[2]
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def text(n: int, seed: int) -> torch.Tensor:
        return torch.randint(0, 250, (1, n), generator=torch.Generator().manual_seed(seed))

    parts = [text(before, 1)]
    for i in range(len(pictures)):
        parts += [torch.full((1, patches // vision.spatial_merge_size**2), PICTURE), text(7, 10 + i)]
    ids = torch.cat([*parts, text(after, 2)], dim=1)
    pixels = [torch.randn(patches, width, generator=torch.Generator().manual_seed(seed)) for seed in pictures]
    return with_ids(ids, pixel_values=torch.cat(pixels), image_grid_thw=torch.tensor([grid] * len(pictures)))


def with_ids(ids: torch.Tensor, **pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of ``generate()`` for these ids."""
    types = (ids == PICTURE).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **pictures}


def run(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """Generate greedily, with logits."""
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **options)


def check(cached: CachedModel, plain: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Compare a call with a model that never cached; return the tokens reused."""
    expected, found = run(plain, inputs), run(cached, inputs)
    assert cached.usage.bypass_reason is None
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-3, rtol=1e-3)
    return cached.usage.cached_tokens


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_prompts_with_pictures(name: str, tmp_path: Path) -> None:
    plain, model = seeing(name), seeing(name)
    two = prompt(model, [1, 2])
    length = two["input_ids"].shape[1]
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        assert check(cached, plain, two) == 0
        assert check(cached, plain, two) == length - 1
        reply = run(plain, two).sequences
        question = torch.cat([reply, reply[:, :9]], dim=1)
        pictures = {"pixel_values": two["pixel_values"], "image_grid_thw": two["image_grid_thw"]}
        assert check(cached, plain, with_ids(question, **pictures)) >= (reply.shape[1] - 1) // BLOCK * BLOCK
        # A third picture: what comes before it is kept.
        assert check(cached, plain, prompt(model, [1, 2, 3])) >= two["input_ids"].shape[1] - 35
        # Other pictures behind the same placeholders, in either place: 20 and 39 tokens are shared.
        assert check(cached, plain, prompt(model, [5, 2])) == BLOCK
        assert check(cached, plain, prompt(model, [1, 5])) == 2 * BLOCK
        # The same ids without a picture.
        without = prompt(model, [1, 2])["input_ids"]
        assert cached.lookup(without).num_tokens == BLOCK
        with pytest.raises(PromptError, match="media"):
            cached.prefill(two)
        cached.close()
    with KVStore(tmp_path / "store") as store:  # as a new process would
        cached = CachedModel(seeing(name), store=store, block_size=BLOCK, progress=False)
        assert cached.lookup(two).num_tokens == length - 1
        assert check(cached, plain, two) == length - 1
        assert set(cached.usage.cached_tokens_by_tier) == {"disk"}
        cached.close()
