"""Restores that go on while the model computes: the same bits, on a device that is late too; and ways to break off."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import StoreWarning, _restore
from kvembed._blockfile import BlockFileSource
from kvembed._restore import Restore
from kvembed._tiers.cpu import MemorySource
from kvembed._transfer.pinned import TorchTransfer

from ._device import pretend_device
from ._lab import BLOCK, Lab, assert_close, assert_equal_bits, cat, leave_only, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed import CachedModel

PROMPT = random_ids(9 * BLOCK + 5)


@pytest.fixture(autouse=True)
def _in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_restore, "_INLINE_BYTES", 0)


@pytest.mark.parametrize("order", ["late", "early", "random"])
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_device_gets_the_bits_of_a_cold_call(
    lab: Lab, model: Any, monkeypatch: pytest.MonkeyPatch, order: str, tier: str
) -> None:
    plain = lab.wrap(model, lab.store("plain"), deterministic=True)
    cold = run_full(plain, PROMPT)
    pretend_device(monkeypatch, order)
    cached = lab.wrap(model, lab.store("other"), deterministic=True)
    assert_equal_bits(run_full(cached, PROMPT), cold)
    leave_only(cached, tier)
    assert_equal_bits(run_full(cached, PROMPT), cold)
    assert cached.usage.cached_tokens_by_tier == {tier: 9 * BLOCK}
    # And what is kept live of it.
    turn = cat(PROMPT, random_ids(7, seed=3))
    assert_equal_bits(run_full(cached, turn), run_full(plain, turn))


def test_a_missing_wait_would_show(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_device(monkeypatch)
    cached = lab.wrap(llama, deterministic=True)
    cold = run_full(cached, PROMPT)
    leave_only(cached, "cpu")
    monkeypatch.setattr(Restore, "_wait_compute", lambda self: None)
    monkeypatch.setattr(Restore, "wait", lambda self, layer: self._ready[layer].wait())
    wrong = run_full(cached, PROMPT)
    assert not torch.equal(torch.stack(wrong.logits), torch.stack(cold.logits))
    lab.expect_sound = False


class Held:
    """Reads that stop before tensor ``at`` of every block until `go`, or fail there.

    Args:
        error: What to raise there instead of waiting.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: Exception | None = None) -> None:
        self.reached, self.may_go = threading.Event(), threading.Event()
        for kind in (MemorySource, BlockFileSource):

            def read_into(source: Any, index: int, *args: Any, original: Any = kind.read_into) -> None:
                if index >= at:
                    self.reached.set()
                    if error is not None:
                        raise error
                    assert self.may_go.wait(30)
                original(source, index, *args)

            monkeypatch.setattr(kind, "read_into", read_into)

    def go(self) -> None:
        """Let them go on."""
        self.may_go.set()


def stored(lab: Lab, model: Any, **options: Any) -> CachedModel:
    cached = lab.wrap(model, **options)
    run(cached, PROMPT)
    leave_only(cached, "disk")
    return cached


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupt_while_layers_are_still_read(
    lab: Lab, llama: Any, plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, layer: int, device: bool
) -> None:
    # The first layers have their rows and the last ones have not: nothing of such a cache may be kept.
    if device:
        pretend_device(monkeypatch)
    cached = stored(lab, llama)
    before = cached.store.stats().tiers[-1].blocks
    threads = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(_restore, "_READERS", 1)
        held = Held(patch, 2)
        wait = Restore.wait

        def interrupted(self: Restore, index: int) -> None:
            if index < layer:
                return wait(self, index)
            held.reached.wait(30)
            held.go()
            self._next = 99  # no reader takes another layer
            raise KeyboardInterrupt

        patch.setattr(Restore, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(cached, PROMPT)
    assert threading.active_count() <= threads
    assert len(cached._engine.live) == 0
    cached.store.flush()
    assert cached.store.stats().tiers[-1].blocks == before
    assert_close(run_full(cached, PROMPT), plain(llama, PROMPT))


@pytest.mark.parametrize("device", [False, True])
def test_a_last_layer_that_is_bad_when_the_others_have_computed(
    lab: Lab, model: Any, plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, device: bool
) -> None:
    if device:
        pretend_device(monkeypatch)
    lab.expect_sound = False
    cached = stored(lab, model)
    assert cached.store.path is not None
    for path in cached.store.path.glob("blocks/*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-150] ^= 0x40  # in the values of the last layer; the ids after them are 64 bytes
        path.write_bytes(data)
    seen: list[int] = []
    wait = Restore.wait

    def note(self: Restore, index: int) -> None:
        seen.append(index)
        wait(self, index)

    monkeypatch.setattr(Restore, "wait", note)
    with pytest.warns(StoreWarning, match="dropped") as caught:
        found = run(cached, PROMPT)
    assert len(caught) == 1
    assert seen
    assert tokens(found) == tokens(plain(model, PROMPT))


def test_a_device_that_fails_is_a_miss_and_no_block_is_blamed(
    lab: Lab, llama: Any, plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_device(monkeypatch)
    lab.expect_sound = False
    cached = stored(lab, llama)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(TorchTransfer, "to_device", fail)
        with pytest.warns(
            StoreWarning, match="could not be copied to the model: RuntimeError: out of memory"
        ) as caught:
            found = run(cached, PROMPT)
    assert len(caught) == 1
    assert tokens(found) == tokens(plain(llama, PROMPT))
    assert cached.usage.cached_tokens == 0
    cached.drop_live()
    run(cached, PROMPT)
    assert cached.usage.cached_tokens == 9 * BLOCK
    assert cached.store.verify().problems == ()


def test_layers_compute_while_later_ones_are_read(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reads of the last layer are let go only once the second one has computed: without the overlap nobody would.
    cached = stored(lab, llama)
    expected = tokens(run(llama, PROMPT))
    with monkeypatch.context() as patch:
        held = Held(patch, 4)
        wait = Restore.wait

        def note(self: Restore, index: int) -> None:
            if index == 2:
                held.go()
            wait(self, index)

        patch.setattr(Restore, "wait", note)
        assert tokens(run(cached, PROMPT)) == expected
    assert cached.usage.cached_tokens_by_tier == {"disk": 9 * BLOCK}


def test_a_stream_closed_while_layers_are_read(
    lab: Lab, llama: Any, plain: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = stored(lab, llama, tokenizer=tiny_tokenizer)
    threads = threading.active_count()
    with monkeypatch.context() as patch:
        held = Held(patch, 2)
        stream = cached.stream(PROMPT, max_new_tokens=500, do_sample=False)
        reader = threading.Thread(target=next, args=(stream, None))
        reader.start()
        assert held.reached.wait(30)
        held.go()
        reader.join(30)
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() <= threads + 1
    assert_close(run_full(cached, PROMPT), plain(llama, PROMPT))
