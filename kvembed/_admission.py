"""`Admission`: which blocks may be written to disk: today's write budget, the policy, and the models' quotas.

A block that may not be written stays in the cpu tier, and is looked at again when it is used again.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvembed._eviction import work
from kvembed._ledger import today
from kvembed._units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvembed._block import BlockInfo
    from kvembed._budgets import NamespaceQuotas
    from kvembed._catalog import Catalog
    from kvembed._ledger import Ledger

__all__ = ["POLICIES", "Admission"]

POLICIES = ("always", "worth", "seen-twice")

_HELD_BACK = 100_000
_SEEN = 500_000
_CHANCE = 0.5  # that a block nobody has asked for twice yet comes back; nothing is known of it


class Admission:
    """Decides what goes to disk.

    Args:
        catalog: Of the store.
        ledger: Where written bytes are counted.
        policy: One of `POLICIES`.
        per_day: Bytes that may be written in a day; None for no limit.
        quotas: Of the models.
        seconds_per_token: Prefill speed of a model by its digest, None when it was not measured.
        report: Called with a kind and a message.
    """

    def __init__(
        self,
        catalog: Catalog,
        ledger: Ledger,
        *,
        policy: str = "always",
        per_day: int | None = None,
        quotas: NamespaceQuotas | None = None,
        seconds_per_token: Callable[[bytes], float | None] = lambda digest: None,
        report: Callable[[str, str], None] = lambda kind, message: None,
    ) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self.policy = policy
        self.per_day = per_day
        self._quotas = quotas
        self._seconds_per_token = seconds_per_token
        self._report = report
        self._names: dict[bytes, str] = {}
        self._seconds_per_byte: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._held_back: set[bytes] = set()
        self._seen: set[bytes] | None = None
        self._spent_on = ""

    def after_fork(self) -> None:
        """Make it usable in a forked child."""
        self._reset()

    # -- the policy: asked when a block is put ---------------------------------------------------------

    def wants(self, info: BlockInfo) -> bool:
        """Return True when the policy has a block written now; otherwise it is held back until it is used again."""
        if self.policy == "always":
            return True
        if self._is_worth(info) if self.policy == "worth" else self._was_seen(info.key):
            return True
        if self._catalog.is_pinned(info.key):
            return True
        self._hold_back(info.key)
        return False

    def _was_seen(self, key: bytes) -> bool:
        return self._ledger.digest_of(key) in self._seen_before()

    def _is_worth(self, info: BlockInfo) -> bool:
        """Weigh what a block would save when it comes back against the time of writing it."""
        per_token, per_byte = self._seconds_per_token(info.namespace), self._seconds_per_byte
        if per_token is None or per_byte is None:
            return True  # nothing was measured yet: the promise is that what was computed is kept
        transfer = per_byte * info.nbytes  # to write it, and about the same to read it back
        chance = 1.0 if self._was_seen(info.key) else _CHANCE
        return chance * (work(info) * per_token - transfer) > transfer

    def _seen_before(self) -> set[bytes]:
        with self._lock:
            if self._seen is not None and len(self._seen) <= _SEEN:
                return self._seen
        # From the log: what other processes and earlier days have asked for counts too.
        seen = {digest for call in self._ledger.calls() for digest in call.keys}
        with self._lock:
            self._seen = seen
        return seen

    def used(self, keys: Sequence[bytes]) -> list[bytes]:
        """Note that a call used blocks; return those that were held back and are now to be written."""
        again: list[bytes] = []
        if self._held_back:
            again = [key for key in keys if key in self._held_back]
        if self.policy != "always":
            seen = self._seen_before()
            again = [key for key in again if self._ledger.digest_of(key) in seen]
            seen.update(self._ledger.digest_of(key) for key in keys)
        if self._spent_on == today():
            return []
        return again

    def _hold_back(self, key: bytes) -> None:
        with self._lock:
            if len(self._held_back) < _HELD_BACK:
                self._held_back.add(key)

    # -- the budgets: asked when a block is about to be written -----------------------------------------

    def take(self, info: BlockInfo, nbytes: int) -> bool:
        """Count a block as written; False when today's budget has no room for it. Pinned blocks always have."""
        pinned = self._catalog.is_pinned(info.key)
        if self._ledger.take("written_bytes", nbytes, None if pinned else self.per_day):
            self._held_back.discard(info.key)
            return True
        self._spent_on = today()
        self._hold_back(info.key)
        self._ledger.add_later(held_back_bytes=nbytes)
        self._report(
            f"writes:{self._spent_on}",
            f"today's write budget of {format_bytes(self.per_day or 0)} is spent: new blocks stay in memory until "
            "tomorrow; raise max_write_bytes_per_day, or pin what must be kept",
        )
        return False

    def flush(self) -> None:
        """Write what the ledger holds."""
        self._ledger.flush()

    def give_back(self, nbytes: int) -> None:
        """Take back `take`, for a block that was not written after all."""
        self._ledger.take("written_bytes", -nbytes, None)

    def written(self, nbytes: int, seconds: float) -> None:
        """Learn from a write how fast the disk is."""
        if seconds > 0 and nbytes >= 1 << 16:
            known, new = self._seconds_per_byte, seconds / nbytes
            self._seconds_per_byte = new if known is None else 0.7 * known + 0.3 * new

    def quota(self, digest: bytes, budget: int) -> int | None:
        """Return the bytes that one model's blocks may take, or None."""
        if not self._quotas:
            return None
        if digest not in self._names:
            spaces = self._catalog.namespaces()
            self._names |= {found: str(fields.get("name", "")) for found, fields in spaces.items() if fields}
        return self._quotas.of(digest, self._names.get(digest, ""), budget)

    def forget(self, keys: Iterable[bytes] | None) -> None:
        """Forget that blocks were held back or seen; None forgets all."""
        with self._lock:
            if keys is None:
                self._held_back.clear()
                self._seen = None
                return
            for key in keys:
                self._held_back.discard(key)
                if self._seen is not None:
                    self._seen.discard(self._ledger.digest_of(key))
