"""Calls that break off: finished blocks are kept, what comes next is right; threads and forked processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed.hf import FullLayer, SlidingLayer

from ._lab import BLOCK, Lab, assert_close, cat, join, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

PROMPT = random_ids(8 * BLOCK + 9)


class InterruptAt:
    """A progress callback that presses Ctrl-C once so many tokens are done."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.seen: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.seen.append((done, total))
        if done >= self.tokens:
            raise KeyboardInterrupt


@pytest.mark.parametrize("verb", ["generate", "prefill", "document"])
def test_interrupt_in_a_prefill_keeps_the_finished_blocks(
    lab: Lab, model: Any, plain: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerFast, verb: str
) -> None:
    callback = InterruptAt(3 * BLOCK)
    cached = lab.wrap(model, tokenizer=tiny_tokenizer, progress=callback)
    text = "a document that is made of many words, " * 4
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: run(cached, PROMPT),
        "prefill": lambda: cached.prefill(PROMPT),
        "document": lambda: cached.document(text),
    }
    with pytest.raises(KeyboardInterrupt):
        calls[verb]()
    assert [done for done, _ in callback.seen] == [BLOCK, 2 * BLOCK, 3 * BLOCK]
    cached.progress = False
    if verb == "document":
        assert cached.document(text).usage.cached_tokens == 3 * BLOCK
        return
    for tier in ("live", "cpu", "disk"):
        lab.leave_only(cached, tier)
        assert cached.lookup(PROMPT).tokens_by_tier == {tier: 3 * BLOCK}
        assert cached.lookup(PROMPT).exact_tokens == 3 * BLOCK
    assert_close(run_full(cached, PROMPT), plain(model, PROMPT))
    assert cached.usage.cached_tokens_by_tier == {"disk": 3 * BLOCK}


def test_progress_tells_where_a_prefill_is(lab: Lab, llama: Any) -> None:
    callback = InterruptAt(10_000)
    cached = lab.wrap(llama, progress=callback)
    cached.prefill(PROMPT[:, : 3 * BLOCK])
    assert callback.seen == [(BLOCK, 48), (2 * BLOCK, 48), (3 * BLOCK, 48)]
    callback.seen.clear()
    run(cached, PROMPT)
    n = PROMPT.shape[1]
    assert callback.seen == [(edge, n) for edge in range(4 * BLOCK, n, BLOCK)]


class BreakAfter:
    """A streamer that fails after so many pieces (the prompt is the first)."""

    def __init__(self, pieces: int, error: BaseException) -> None:
        self.left = pieces
        self.error = error

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self) -> None:
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("in the streamer")])
def test_a_partial_reply_is_reused(lab: Lab, model: Any, plain: Callable[..., Any], error: BaseException) -> None:
    cached = lab.wrap(model)
    with pytest.raises(type(error)):
        run(cached, PROMPT, 40, streamer=BreakAfter(21, error))  # the prompt and 20 tokens pass
    whole = tokens(plain(model, PROMPT, 40))
    partial = join(whole[: PROMPT.shape[1] + 20])
    for tier in ("live", "cpu", "disk"):
        lab.leave_only(cached, tier)
        assert cached.lookup(cat(partial, join([1, 2, 3]))).tokens_by_tier == {tier: PROMPT.shape[1] + 20}
    turn = cat(partial, random_ids(5, seed=3))
    assert_close(run_full(cached, turn), plain(model, turn))
    assert tokens(run(cached, PROMPT, 40)) == whole


def interrupt_layer(patch: pytest.MonkeyPatch, layer: int, at_call: int) -> None:
    """Raise once one layer has its new rows for the so manieth time; the model is left alone: it would be another."""
    calls = 0
    for kind in (FullLayer, SlidingLayer):

        def update(self: Any, *args: Any, original: Any = kind.update, **kwargs: Any) -> Any:
            nonlocal calls
            result = original(self, *args, **kwargs)
            calls += self.index == layer
            if self.index == layer and calls == at_call:
                raise KeyboardInterrupt
            return result

        patch.setattr(kind, "update", update)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("at_call", [5, 18])
def test_a_forward_torn_in_the_middle(
    lab: Lab, model: Any, plain: Callable[..., Any], layer: int, at_call: int
) -> None:
    # Some layers have the new tokens and some have not: what is kept must be what all of them have.
    cached = lab.wrap(model)
    whole = join(tokens(plain(model, PROMPT, 40)))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_layer(patch, layer, at_call)
        with pytest.raises(KeyboardInterrupt):
            run(cached, PROMPT, 40)
    # Eight calls are prefill steps, the ninth is the rest of the prompt, then every token is one.
    expected = 4 * BLOCK if at_call == 5 else PROMPT.shape[1] + 8
    assert cached.lookup(whole).num_tokens == expected
    assert_close(run_full(cached, whole), plain(model, whole))


# ------------------------------------------------------------------------------------- streams


def test_stream_gives_the_text_of_a_plain_call(
    lab: Lab, model: Any, plain: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    cached = lab.wrap(model, tokenizer=tiny_tokenizer)
    pieces = list(cached.stream(PROMPT, max_new_tokens=30, do_sample=False))
    expected = tokens(plain(model, PROMPT, 30))[PROMPT.shape[1] :]
    assert "".join(pieces) == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    assert cached.usage.completion_tokens == 30


def test_a_stream_closed_early_keeps_its_kv(
    lab: Lab, llama: Any, plain: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    cached = lab.wrap(llama, tokenizer=tiny_tokenizer)
    threads = threading.active_count()
    stream = cached.stream(PROMPT, max_new_tokens=2000, do_sample=False)
    while not next(stream):
        pass
    assert hasattr(stream, "close")
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() <= threads + 1  # the store's writer may have started
    assert 1 <= cached.usage.completion_tokens < 1000
    assert cached.lookup(cat(PROMPT, join([1]))).num_tokens == PROMPT.shape[1]
    assert_close(run_full(cached, PROMPT), plain(llama, PROMPT))


def test_an_error_in_a_stream_reaches_the_reader(lab: Lab, llama: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    cached = lab.wrap(llama, tokenizer=tiny_tokenizer)

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > PROMPT.shape[1] + 10:
            raise ZeroDivisionError("in a processor")
        return scores

    pieces = []
    with pytest.raises(ZeroDivisionError, match="in a processor"):
        pieces.extend(cached.stream(PROMPT, max_new_tokens=30, do_sample=False, logits_processor=[fail]))
    assert tokens(run(cached, PROMPT)) == tokens(run(llama, PROMPT))


def test_a_stream_that_is_never_read_does_not_start(
    lab: Lab, llama: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    cached = lab.wrap(llama, tokenizer=tiny_tokenizer)
    stream = cached.stream(PROMPT, max_new_tokens=30)
    del stream
    assert cached.usage.prompt_tokens == 0
    assert cached.store.stats().tiers[0].blocks == 0


# ------------------------------------------------------------------------- threads and processes


def test_calls_from_two_threads(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(model, max_live=1)
    prompts = [[cat(random_ids(40, seed=t), random_ids(3 + i, seed=50 + i)) for i in range(6)] for t in range(2)]
    expected = [[tokens(plain(model, prompt)) for prompt in each] for each in prompts]
    found: list[list[list[int]]] = [[], []]
    errors: list[BaseException] = []

    def work(which: int) -> None:
        try:
            found[which] = [tokens(run(cached, prompt)) for prompt in prompts[which]]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert found == expected


def test_two_models_in_two_threads_on_one_store(lab: Lab, models: dict[str, Any], plain: Callable[..., Any]) -> None:
    store = lab.store()
    names = ("llama", "gemma3")
    wrapped = [lab.wrap(models[name], store) for name in names]
    prompts = [random_ids(70, seed=s) for s in (1, 2, 1, 2, 3)]
    expected = [[tokens(plain(models[name], p)) for p in prompts] for name in names]
    found: list[Any] = [None, None]

    def work(which: int) -> None:
        found[which] = [tokens(run(wrapped[which], p)) for p in prompts]

    threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_generates_and_stores(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(llama)
    run(cached, PROMPT)
    cached.store.flush()
    expected, other = tokens(plain(llama, PROMPT)), random_ids(60, seed=8)
    expected_other = tokens(plain(llama, other))
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        first = tokens(run(cached, PROMPT))
        usage = cached.usage.cached_tokens
        second = tokens(run(cached, other))
        cached.close()
        cached.store.close()
        send.send((first, usage, second))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: fork with threads
        process = context.Process(target=child)
        process.start()
    assert receive.poll(60), "the child hangs"
    assert receive.recv() == (expected, PROMPT.shape[1] - 1, expected_other)
    process.join(20)
    assert process.exitcode == 0
    # The parent goes on, and finds what the child has stored.
    assert tokens(run(cached, other)) == expected_other
    assert cached.usage.cached_tokens_by_tier == {"disk": other.shape[1] - 1}


def test_interrupts_at_random_moments(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    # Not a callback of ours: wherever the main thread is. Whatever was kept must be right.
    import signal

    cached = lab.wrap(llama)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for seed in range(12):
            prompt = cat(PROMPT[:, : 20 + 8 * seed], random_ids(40, seed=seed))
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.004 * seed)
            try:
                run(cached, prompt, 200)
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert time.perf_counter() - began < 30
            if seed % 3 == 0:
                assert tokens(run(cached, prompt)) == tokens(plain(llama, prompt))
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert_close(run_full(cached, PROMPT), plain(llama, PROMPT))
