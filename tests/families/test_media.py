"""Pictures, video and sound, family by family: reused only where the very same come again, and the text is plain's."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from kvembed import CacheBypassWarning, CachedModel, KVStore, PromptError, StoreWarning, hf
from kvembed._bypass import bypass_reason
from kvembed._keys import as_token_ids, chain_keys
from kvembed._media import MediaError, read_media
from kvembed._media_trial import MediaVerdict
from kvembed.hf._compat import is_before
from tests.model._lab import leave_only

from .media_zoo import AUDIO, IMAGE, MEDIA, VIDEO, arguments_of, prompt, seeing, with_ids
from .zoo import build

if TYPE_CHECKING:
    from ._record import Record

BLOCK = 16
NEW = 4
SERVED = [name for name, family in MEDIA.items() if not family.refused]
REFUSED = [name for name, family in MEDIA.items() if family.refused]

Inputs = dict[str, torch.Tensor]


def run(model: Any, inputs: Inputs, **options: Any) -> Any:
    """Generate, with logits."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


class Plain:
    """A model that never caches, and need not compute the same prompt twice.

    Args:
        name: The family.
    """

    def __init__(self, name: str) -> None:
        self.model = seeing(name)
        self.config = self.model.config
        self._known: dict[tuple[tuple[str, bytes], ...], Any] = {}

    def generate(self, **arguments: Any) -> Any:
        """Generate, or remember."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        key = tuple((name, value.numpy().tobytes()) for name, value in sorted(tensors.items()))
        if key not in self._known:
            self._known[key] = self.model.generate(**arguments)
        return self._known[key]


def logits_of(result: Any) -> torch.Tensor:
    """Return the logits of all new tokens."""
    return torch.stack(result.logits)


def check(cached: CachedModel, plain: Any, inputs: Inputs, **options: Any) -> int:
    """Compare a call with a model that never cached; return the tokens reused."""
    expected, found = run(plain, inputs, **options), run(cached, inputs, **options)
    assert cached.usage.bypass_reason is None
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=2e-3, rtol=1e-3)
    return cached.usage.cached_tokens


def starts(inputs: Inputs, name: str, config: Any, pictures: int) -> list[int]:
    """Return the position of the first placeholder of each picture."""
    placeholders = torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE, VIDEO, AUDIO])).nonzero().flatten()
    counts = [sum(t in (IMAGE, VIDEO, AUDIO) for t in MEDIA[name].item(config, i, 0)[1]) for i in range(pictures)]
    return [int(placeholders[sum(counts[:i])]) for i in range(pictures)]


def full_blocks(reply: torch.Tensor) -> int:
    """Return how many tokens of a turn are in full blocks: a result with logits takes its live cache along."""
    return (reply.shape[1] - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str, tmp_path: Path, record: Record) -> None:
    plain, model = Plain(name), seeing(name)
    config = plain.config
    two = prompt(name, config, [1, 2])
    length = two["input_ids"].shape[1]
    first, second = starts(two, name, config, 2)
    # The pictures are felt at all: else none of this could fail.
    for pictures in ([5, 2], [1, 5]):
        other = logits_of(run(plain, prompt(name, config, pictures)))
        assert float((other[0] - logits_of(run(plain, two))[0]).abs().max()) > 1e-2
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        state = cached._engine.spec.has_state
        assert check(cached, plain, two) == 0
        again = first // BLOCK * BLOCK if state else (length - 1) // BLOCK * BLOCK
        assert check(cached, plain, two) >= again
        # The next turn, and a further picture.
        reply = run(plain, two).sequences
        turn = torch.cat([reply, reply[:, :9]], dim=1)
        assert check(cached, plain, with_ids(name, turn, arguments_of(name, config, [1, 2]))) >= full_blocks(reply)
        check(cached, plain, prompt(name, config, [1, 2, 3]))
        # Other pictures behind the same placeholders, in either place; and in the other order.
        reused = []
        for pictures, most in (([5, 2], first), ([2, 1], first), ([1, 5], second)):
            inputs = prompt(name, config, pictures)
            assert cached.lookup(inputs).num_tokens <= most
            reused.append(check(cached, plain, inputs))
            assert reused[-1] <= most
        between = reused[-1] > first
        # From a live sequence.
        sequences = run(plain, two).sequences
        for _ in range(2):
            assert torch.equal(cached.generate(**two, max_new_tokens=NEW, do_sample=False), sequences)
        assert cached.usage.cached_tokens >= again
        assert state or set(cached.usage.cached_tokens_by_tier) == {"live"}
        # From the slower tiers.
        for tier in ("cpu", "disk"):
            leave_only(cached, tier)
            assert check(cached, plain, two) >= again
            assert set(cached.usage.cached_tokens_by_tier) == {tier}
        # The same ids without a picture, and other text after what comes before the first one.
        without = two["input_ids"]
        assert cached.lookup(without).num_tokens <= first
        text = torch.cat([without[:, : first // BLOCK * BLOCK], without[:, -9:]], dim=1)
        assert check(cached, plain, {"input_ids": text, "attention_mask": torch.ones_like(text)}) >= BLOCK * (not state)
        store.flush()
        assert store.verify().problems == ()
        result = record.media_of(name)
        result.served, result.between = True, between
        cached.close()
    with KVStore(tmp_path / "store") as store:  # as a new process would
        cached = CachedModel(seeing(name), store=store, block_size=BLOCK, progress=False)
        assert check(cached, plain, two) >= again
        assert set(cached.usage.cached_tokens_by_tier) == {"disk"}
        cached.close()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, record: Record) -> None:
    plain, model = seeing(name), seeing(name)
    inputs = prompt(name, plain.config, [1])
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for turn in range(2):
            with pytest.warns(CacheBypassWarning, match="not cached") if turn == 0 else contextlib.nullcontext():
                found = run(cached, inputs)
            assert torch.equal(found.sequences, run(plain, inputs).sequences)
            assert cached.usage.bypass_reason is not None
            assert MEDIA[name].refused in cached.usage.bypass_reason
        record.media_of(name).reason = re.sub(r" \(relative error [^)]*\)", "", str(cached.usage.bypass_reason))
        assert store.ls() == []
        cached.close()


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.pieces.append([])


GEMMA_RESUMES = not is_before((5, 23))
"""Older ones cut its token types for the mask where they go on, and then its pictures are computed anew."""
SOME = ["qwen2_5_vl", "gemma3", "mistral3", "qwen2_audio"]


@pytest.mark.parametrize("name", SOME)
def test_ways_of_generating(name: str, tmp_path: Path) -> None:
    plain, model = seeing(name), seeing(name)
    inputs = prompt(name, plain.config, [1, 2])
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for turn in range(3):
            # Sampled, with the caller's seed: what is tried out at the first call draws nothing.
            torch.manual_seed(3)
            expected = plain.generate(**inputs, do_sample=True, temperature=2.0, max_new_tokens=6)
            torch.manual_seed(3)
            assert torch.equal(cached.generate(**inputs, do_sample=True, temperature=2.0, max_new_tokens=6), expected)
            streams = Collector(), Collector()
            for who, stream in zip((plain, cached), streams, strict=True):
                who.generate(**inputs, do_sample=False, max_new_tokens=NEW, streamer=stream)
            assert streams[0].pieces == streams[1].pieces
            assert cached.usage.cached_tokens > 0
            if turn == 1:
                leave_only(cached, "disk")
        cached.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beams"),
        ({"num_return_sequences": 2}, "several sequences"),
        ({"prompt_lookup_num_tokens": 3}, "assistant"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"vision_feature_layer": -2}, "argument 'vision_feature_layer'"),  # changes the features, is in no digest
        ({"image_pixel_values": torch.ones(1, 3)}, "argument 'image_pixel_values'"),  # Phi-4 Multimodal
        ({"aspect_ratio_ids": torch.ones(1, 1)}, "argument 'aspect_ratio_ids'"),  # Mllama
        ({"use_audio_in_video": True}, "argument 'use_audio_in_video'"),
        ({"moe_mm_token_type_ids": torch.ones(1, 3)}, "argument 'moe_mm_token_type_ids'"),
        ({"token_type_ids": [[1, 0]]}, ""),
    ],
)
def test_ways_that_pass_through(options: dict[str, Any], reason: str) -> None:
    model = seeing("qwen2_5_vl")
    inputs = prompt("qwen2_5_vl", model.config, [1])
    assert bypass_reason(model, None, None, inputs) is None
    found = bypass_reason(model, None, None, {**inputs, **options})
    if reason:
        assert found is not None
        assert reason in found
    else:  # found when the media are read
        with pytest.raises(MediaError, match="another shape"):
            read_media(model.config, as_token_ids(inputs["input_ids"][0].numpy()), {**inputs, **options})


@pytest.mark.parametrize("name", SOME)
def test_deterministic_has_the_bits_of_cold(name: str, tmp_path: Path) -> None:
    model = seeing(name)
    inputs = prompt(name, model.config, [1], before=2 * BLOCK + 5)
    logits = []
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False, deterministic=True)
        for tier in ("cold", "cpu", "disk"):
            if tier != "cold":
                leave_only(cached, tier)
            logits.append(logits_of(run(cached, inputs)))
            reused = tier != "cold" and (name != "gemma3" or GEMMA_RESUMES)
            assert cached.usage.cached_tokens == (2 * BLOCK if reused else 0)
        cached.close()
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def _long_picture(config: Any) -> Inputs:
    """A picture of Qwen2.5-VL over several blocks: 21 tokens of text, 48 of the picture, 20 of text."""
    grid, vision = (1, 12, 16), config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(12 * 16, width, generator=torch.Generator().manual_seed(1))
    text = torch.randint(0, 250, (1, 41), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([text[:, :21], torch.full((1, 48), IMAGE), text[:, 21:]], dim=1)
    return with_ids("qwen2_5_vl", ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])})


def test_a_bad_block_inside_a_picture_costs_the_picture(tmp_path: Path) -> None:
    plain, model = seeing("qwen2_5_vl"), seeing("qwen2_5_vl")
    inputs = _long_picture(plain.config)
    folder = tmp_path / "store"
    with KVStore(folder) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        assert check(cached, plain, inputs) == 0
        media = read_media(plain.config, as_token_ids(inputs["input_ids"][0].numpy()), inputs)
        keys = chain_keys(cached._engine.root, media.ids, BLOCK)
        cached.close()
    # The third block is inside the picture: 32 to 48 of 21 to 69.
    path = next((folder / "blocks").rglob(f"{keys[2].hex()}.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with KVStore(folder) as store:
        cached = CachedModel(seeing("qwen2_5_vl"), store=store, block_size=BLOCK, progress=False)
        assert cached.lookup(inputs).num_tokens > 69
        with pytest.warns(StoreWarning):
            reused = check(cached, plain, inputs)
        assert reused in (BLOCK, 21)
        assert cached.lookup(inputs).num_tokens > 69  # stored anew
        assert check(cached, plain, inputs) > 69
        cached.close()


def test_interrupted_inside_a_call_with_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = seeing("qwen2_5_vl"), seeing("qwen2_5_vl")
    inputs = _long_picture(plain.config)
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        check(cached, plain, prompt("qwen2_5_vl", plain.config, [1]))  # tried out
        layer = model.model.language_model.layers[1]

        def stop(*args: Any, **kwargs: Any) -> Any:
            if args[0].shape[1] > 2 * BLOCK:  # the forward of the picture
                raise KeyboardInterrupt
            return type(layer).forward(layer, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", stop)
            with pytest.raises(KeyboardInterrupt):
                run(cached, inputs)
        assert cached.lookup(inputs).num_tokens <= 21
        assert check(cached, plain, inputs) <= 21
        assert check(cached, plain, inputs) > 69
        cached.close()


def test_damaged_rows_of_a_picture_are_seen(tmp_path: Path) -> None:
    """A control: were anything else restored for a picture's tokens than what belongs there, the tests above fail."""
    plain, model = seeing("qwen2_5_vl"), seeing("qwen2_5_vl")
    inputs = _long_picture(plain.config)
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        assert torch.equal(
            cached.generate(**inputs, max_new_tokens=NEW, do_sample=False),
            plain.generate(**inputs, max_new_tokens=NEW, do_sample=False),
        )
        for layer in hf.layers_of(cached._engine.live._sequences[0].cache):
            for rows in layer.rows(32, 48):
                rows.mul_(-1)
        found = run(cached, inputs)
        assert cached.usage.cached_tokens > 69
        assert not torch.allclose(logits_of(found), logits_of(run(plain, inputs)), atol=1e-2)
        cached.close()


_SECOND_PROCESS = """
import sys, torch
from kvembed import CachedModel, KVStore
from tests.families.media_zoo import prompt, seeing
model = seeing("qwen2_5_vl")
inputs = prompt("qwen2_5_vl", model.config, [1, 2])
with KVStore(sys.argv[1]) as store:
    cached = CachedModel(model, store=store, block_size=16, progress=False)
    result = cached.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    torch.save((result.sequences, torch.stack(result.logits), cached.usage.cached_tokens_by_tier), sys.argv[2])
    cached.close()
"""


def test_a_new_process_restores_the_positions(tmp_path: Path) -> None:
    """How far a picture moved the positions is kept on the model, which a new process has not."""
    plain = seeing("qwen2_5_vl")
    inputs = prompt("qwen2_5_vl", plain.config, [1, 2])
    expected = run(plain, inputs)
    assert int(plain.model.rope_deltas) != 0
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(seeing("qwen2_5_vl"), store=store, block_size=BLOCK, progress=False)
        check(cached, plain, inputs)
        cached.close()
    command = [sys.executable, "-c", _SECOND_PROCESS, str(tmp_path / "store"), str(tmp_path / "result")]
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(command, check=True, timeout=120, cwd=root, env={**os.environ, "PYTHONPATH": path})
    sequences, logits, tiers = torch.load(tmp_path / "result", weights_only=True)
    assert torch.equal(sequences, expected.sequences)
    torch.testing.assert_close(logits, logits_of(expected), atol=2e-3, rtol=1e-3)
    assert set(tiers) == {"disk"}
    assert tiers["disk"] >= (inputs["input_ids"].shape[1] - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_text_after_a_picture(name: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 250, (1, 3 * BLOCK + 4), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    model: Any = build(name)
    expected = model.generate(ids, **options)
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for _ in range(2):
            # What generating with an image leaves behind: later positions would be off by this.
            model.model.rope_deltas = torch.tensor([[-7]])
            assert torch.equal(cached.generate(ids, **options), expected)
        assert cached.usage.cached_tokens == 3 * BLOCK + 3
        cached.close()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_only_the_pictures_of_the_suffix_are_encoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = seeing(name)
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        run(cached, prompt(name, model.config, [1, 2]))
        seen: list[int] = []
        encode = model.model.get_image_features

        def counting(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(pixel_values))
            return encode(pixel_values, *args, **kwargs)

        counting.__signature__ = inspect.signature(encode)  # pyright: ignore[reportFunctionMemberAccess]
        monkeypatch.setattr(model.model, "get_image_features", counting)
        run(cached, prompt(name, model.config, [1, 2]))
        assert seen == []
        three = prompt(name, model.config, [1, 2, 3])
        run(cached, three)
        assert sum(seen) < len(three["pixel_values"]) / 2
        cached.close()


def test_a_failure_on_top_of_reused_media_is_a_slower_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = seeing("qwen2_5_vl"), seeing("qwen2_5_vl")
    inputs, other = (prompt("qwen2_5_vl", plain.config, pictures) for pictures in ([1, 2], [1, 2, 3]))
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        check(cached, plain, inputs)
        inner: Any = model.model
        encode = inner.get_image_features

        def picky(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
            if len(pixel_values) < len(other["pixel_values"]):
                raise ValueError("all pictures, or none")
            return encode(pixel_values, **kwargs)

        picky.__signature__ = inspect.signature(encode)  # pyright: ignore[reportFunctionMemberAccess]
        streams = Collector(), Collector()
        plain.generate(**other, max_new_tokens=NEW, do_sample=False, streamer=streams[0])
        with monkeypatch.context() as patch:
            patch.setattr(inner, "get_image_features", picky)
            cached.generate(**other, max_new_tokens=NEW, do_sample=False, streamer=streams[1])
        assert streams[0].pieces == streams[1].pieces
        assert cached.usage.cached_tokens == 0
        with pytest.warns(CacheBypassWarning, match="in two calls"):  # and it is not tried again
            run(cached, other)
        cached.close()


def test_the_callers_mistake_is_theirs(tmp_path: Path) -> None:
    plain, model = seeing("qwen2_5_vl"), seeing("qwen2_5_vl")
    right = prompt("qwen2_5_vl", plain.config, [1, 2, 3])
    wrong = {**right, "pixel_values": right["pixel_values"][:-4], "image_grid_thw": right["image_grid_thw"][:-1]}
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for _ in range(2):
            check(cached, plain, prompt("qwen2_5_vl", plain.config, [1, 2]))
            errors = []
            for who in (plain, cached):
                with pytest.raises(Exception) as caught:
                    run(who, wrong)
                errors.append((caught.type, str(caught.value)))
            assert errors[0] == errors[1]
            assert check(cached, plain, right) > 2 * BLOCK  # nothing was learned from that
        cached.close()


def test_ids_that_stand_for_media_are_no_prompt(tmp_path: Path) -> None:
    model = seeing("qwen2_5_vl")
    inputs = prompt("qwen2_5_vl", model.config, [1])
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        run(cached, inputs)
        media = read_media(model.config, as_token_ids(inputs["input_ids"][0].numpy()), inputs)
        ids = torch.from_numpy(media.ids.astype("int64"))[None]
        assert cached._engine.match(media.ids, deterministic=False).tokens > BLOCK
        with pytest.raises(IndexError):  # as in plain transformers
            cached.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
        with pytest.raises(PromptError, match="media"):
            cached.prefill(inputs)
        cached.close()


class _Wrong:
    """Patches of a model that make reuse wrong with media, and right without."""

    @staticmethod
    def everything_shifts(model: Any) -> None:
        """Text that is computed with a picture differs from text that is not."""
        inner, plain = model.model.forward, model.get_input_embeddings().forward
        on = []

        def embed(ids: torch.Tensor) -> torch.Tensor:
            return plain(ids) + (0.1 if on else 0.0)

        def forward(*args: Any, **kwargs: Any) -> Any:
            on[:] = [1] if (kwargs.get("mm_encoder_outputs") or {}).get("image") is not None else []
            return inner(*args, **kwargs)

        forward.__signature__ = inspect.signature(inner)  # pyright: ignore[reportFunctionMemberAccess]
        model.model.forward, model.get_input_embeddings().forward = forward, embed

    @staticmethod
    def pictures_know_each_other(model: Any) -> None:
        """Features depend on how many pictures there are."""
        inner = model.model.get_image_features

        def encode(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
            found = inner(pixel_values, **kwargs)
            found.pooler_output = tuple(part * (1 + 0.1 * len(pixel_values)) for part in found.pooler_output)
            return found

        encode.__signature__ = inspect.signature(inner)  # pyright: ignore[reportFunctionMemberAccess]
        model.model.get_image_features = encode


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda model: None, MediaVerdict(True, True, True)),
        (_Wrong.everything_shifts, MediaVerdict(False, False, True)),
        (_Wrong.pictures_know_each_other, MediaVerdict(True, True, False)),
    ],
)
def test_the_trial_finds_models_that_are_wrong(wrong: Any, expected: MediaVerdict, tmp_path: Path) -> None:
    plain, model = seeing("llava"), seeing("llava")
    wrong(plain)
    wrong(model)
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        assert cached.support is None
        for number, pictures in enumerate(([1, 2], [1, 2], [1, 3], [1, 2, 3])):
            inputs = prompt("llava", plain.config, pictures)
            ids = as_token_ids(inputs["input_ids"][0].numpy())
            with contextlib.nullcontext() if number or expected.follows else pytest.warns(CacheBypassWarning):
                found = run(cached, inputs)
            torch.testing.assert_close(logits_of(found), logits_of(run(plain, inputs)), atol=2e-3, rtol=1e-3)
            assert cached._engine.wrapped.media_verdict(read_media(plain.config, ids, inputs)) == expected
        cached.close()


def test_what_one_kind_of_call_shows_is_not_taken_for_another(tmp_path: Path) -> None:
    model = seeing("gemma3")
    inputs = prompt("gemma3", model.config, [1])
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        check(cached, seeing("gemma3"), inputs)
        ids = as_token_ids(inputs["input_ids"][0].numpy())
        known = cached._engine.wrapped.media_verdict
        assert known(read_media(model.config, ids, inputs)) == MediaVerdict(True, GEMMA_RESUMES, None)
        del inputs["token_type_ids"]  # then a picture's tokens see only those before them
        assert known(read_media(model.config, ids, inputs)) == MediaVerdict()
        assert check(cached, seeing("gemma3"), inputs) <= 21
        cached.close()


def test_the_snippet_of_the_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "media.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    model = seeing("qwen2_5_vl")
    inputs = prompt("qwen2_5_vl", model.config, [1])
    processor = SimpleNamespace(apply_chat_template=lambda *args, **kwargs: inputs, tokenizer=None)
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        names = {"CachedModel": CachedModel, "store": store, "messages": [], "processor": processor, "model": model}
        exec(code, names)
        expected = seeing("qwen2_5_vl").generate(**inputs, max_new_tokens=100)
        assert torch.equal(names["reply"], expected)
        names["cached"].close()
    assert "prompt" in capsys.readouterr().out


class _Theirs(Exception):
    """What the caller's own code raises."""


class _Raising:
    """A logits processor, a stopping criterion or a streamer of the caller's, that fails at its ``nth`` call."""

    def __init__(self, nth: int) -> None:
        self.nth, self.calls, self.error = nth, 0, _Theirs("of the caller's own")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.nth:
            raise self.error
        return args[1] if not kwargs and isinstance(args[1], torch.Tensor) else torch.zeros(1, dtype=torch.bool)

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == self.nth:
            raise self.error

    def end(self) -> None:
        pass


WHERE = {
    "processor, first token": ("logits_processor", 1),
    "processor, second token": ("logits_processor", 2),
    "prefix_allowed_tokens_fn": ("prefix_allowed_tokens_fn", 1),
    "criterion, first token": ("stopping_criteria", 1),
    "streamer, the prompt": ("streamer", 1),
    "streamer, first token": ("streamer", 2),
}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("where", WHERE)
def test_what_the_callers_own_code_raises_is_theirs(name: str, where: str, tmp_path: Path) -> None:
    """It comes out as it is, from one call; and nothing is concluded about the media that were reused."""
    plain, model = Plain(name), seeing(name)
    inputs = prompt(name, plain.config, [1, 2])
    argument, nth = WHERE[where]
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        check(cached, plain, inputs)
        for tier in ("live", "cpu", "disk"):
            leave_only(cached, tier)
            theirs = _Raising(nth)
            value = [theirs] if argument in ("logits_processor", "stopping_criteria") else theirs
            with pytest.raises(_Theirs) as caught:
                run(cached, inputs, **{argument: value})
            assert caught.value is theirs.error
            assert caught.value.__cause__ is None
            assert theirs.calls == nth  # once, and not again in a repeated call
            assert check(cached, plain, inputs) > 2 * BLOCK
        cached.close()


def _sparse(value: torch.Tensor) -> torch.Tensor:
    return value.to_sparse()


def _on_meta(value: torch.Tensor) -> torch.Tensor:
    return value.to("meta")


def _with(number: float) -> Any:
    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value.view(-1)[3] = number
        return value

    return change


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen2_audio"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_sparse, "not a plain tensor"),
        (_on_meta, "meta device"),
        (_with(float("nan")), "not finite"),
        (_with(float("inf")), "not finite"),
    ],
)
def test_tensors_that_cannot_be_compared_pass_through(name: str, change: Any, reason: str, tmp_path: Path) -> None:
    """What becomes of them is up to transformers; and nothing is concluded about other media."""
    plain, model = seeing(name), seeing(name)
    right = prompt(name, plain.config, [1])
    pixels = next(key for key in right if key in ("pixel_values", "input_features"))
    wrong = {**right, pixels: change(right[pixels])}
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        outcomes: list[Any] = []
        for who in (plain, cached):
            with contextlib.nullcontext() if who is plain else _passing_through(reason):
                try:
                    outcomes.append(run(who, wrong).sequences.tolist())
                except Exception as error:
                    outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]
        if isinstance(outcomes[0], list):
            assert reason in (cached.usage.bypass_reason or "")
        with pytest.raises(PromptError, match=reason):
            cached.lookup(wrong)
        assert check(cached, plain, right) == 0
        assert check(cached, plain, right) >= BLOCK
        cached.close()


@contextlib.contextmanager
def _passing_through(reason: str) -> Any:
    """The warning of a call that passes through, if it succeeds; what fails says so itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CacheBypassWarning)
        yield
    assert all(reason in str(warning.message) for warning in caught if warning.category is CacheBypassWarning)
