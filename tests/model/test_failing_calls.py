"""The disk or the catalog fails while a model generates: the text is right, and a warning says what happened."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import StoreWarning

from ._lab import BLOCK, Lab, cat, random_ids, run, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = random_ids(5 * BLOCK + 11)
LATER = [cat(PROMPT, random_ids(9, seed=1)), random_ids(50, seed=2), cat(PROMPT, random_ids(9, seed=3)), PROMPT]


class Broken:
    """Makes calls fail while it is switched on."""

    def __init__(self, patch: pytest.MonkeyPatch, what: str, error: Exception) -> None:
        self.on = False
        self.failed = 0
        broken = self
        if what != "sql":
            real = getattr(os, what)

            def call(*args: Any, **kwargs: Any) -> Any:
                if broken.on and (what != "open" or "safetensors" in str(args[0]) or ".tmp" in str(args[0])):
                    broken.failed += 1
                    raise error
                return real(*args, **kwargs)

            patch.setattr(os, what, call)
            return

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                if broken.on:
                    broken.failed += 1
                    raise error
                return super().execute(sql, *args)

        connect = sqlite3.connect
        patch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, **kwargs, factory=Connection))


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


FAILURES: list[tuple[str, Exception]] = [
    ("open", os_error(errno.EMFILE)),
    ("open", os_error(errno.EIO)),
    ("pread", os_error(errno.EIO)),
    ("preadv", os_error(errno.EIO)),
    ("writev", os_error(errno.ENOSPC)),
    ("replace", os_error(errno.EIO)),
    ("close", os_error(errno.EIO)),
    ("sql", sqlite3.OperationalError("database is locked")),
    ("sql", sqlite3.OperationalError("database or disk is full")),
    ("sql", sqlite3.OperationalError("disk I/O error")),
    ("sql", sqlite3.DatabaseError("database disk image is malformed")),
]


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system reads in another way")
@pytest.mark.parametrize(("what", "error"), FAILURES, ids=[f"{w}-{e}" for w, e in FAILURES])
@pytest.mark.parametrize("cpu", [1 << 20, None])
def test_generation_goes_on(
    lab: Lab,
    llama: Any,
    plain: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    error: Exception,
    cpu: int | None,
) -> None:
    lab.expect_sound = False
    expected = [tokens(plain(llama, prompt)) for prompt in LATER]
    monkeypatch.setattr("kvembed._connections._BUSY_S", 0.05)  # how long a locked catalog is waited for
    broken = Broken(monkeypatch, what, error)
    first = lab.wrap(llama, lab.store())
    run(first, PROMPT)
    first.close()
    first.store.close()
    cached = lab.wrap(llama, lab.store(max_cpu_bytes=cpu), max_live=0)
    broken.on = True
    messages: list[str] = []
    for prompt, answer in zip(LATER, expected, strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", StoreWarning)
            assert tokens(run(cached, prompt)) == answer
            cached.store.flush()
        mine = [str(w.message) for w in caught if issubclass(w.category, StoreWarning)]
        assert len(mine) <= 1
        messages += mine
    broken.on = False
    assert broken.failed
    text = "; ".join(messages)
    if what != "close":  # of files that were read; nothing is lost with those
        assert (str(error.strerror) if isinstance(error, OSError) else str(error)) in text
    # Every kind of trouble is told once: at most one sentence for a lookup, a read, a write ...
    told = [part.split(":")[0] for part in text.split("; ")]
    assert len([part for part in told if part.startswith("blocks are kept in memory")]) <= 1
    monkeypatch.undo()
    cached.close()
    cached.store.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # after "malformed" the catalog is made again
        store = lab.store()
    again = lab.wrap(llama, store, max_live=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoreWarning)
        assert tokens(run(again, PROMPT)) == expected[-1]
        store.flush()
        assert tokens(run(again, PROMPT)) == expected[-1]
    assert again.usage.cached_tokens == PROMPT.shape[1] - 1
    assert store.verify(fix=True).ok


def test_a_clock_that_jumps(lab: Lab, llama: Any, plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real, rng = time.time, random.Random(1)
    monkeypatch.setattr(time, "time", lambda: real() + rng.choice([0, 0, 3e8, -3e8]))
    for turn in range(2):
        cached = lab.wrap(llama, lab.store(), max_live=0)
        for prompt in LATER:
            with warnings.catch_warnings():
                warnings.simplefilter("error", StoreWarning)
                assert tokens(run(cached, prompt)) == tokens(plain(llama, prompt))
            if turn:
                # Tails are found by their first 8 tokens; a shorter rest is computed.
                assert cached.usage.cached_tokens >= prompt.shape[1] - 8
        cached.close()
        cached.store.close()
