"""What a `CachedModel` knows of itself and of what is stored: its verbs that generate nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvembed._audit import Auditor, AuditReport
from kvembed._errors import ConfigError, PromptError, UnsupportedModelError
from kvembed._explain import explain_prompt
from kvembed._html import panel, table_html
from kvembed._match import Explanation, PrefixMatch
from kvembed._media import Media, MediaError, has_media, read_media
from kvembed._prompt import check_prompt, encode
from kvembed._spans import as_spans
from kvembed._units import format_bytes, format_count

if TYPE_CHECKING:
    import os
    import threading
    from collections import deque
    from collections.abc import Callable

    from kvembed._documents.library import Library
    from kvembed._encryption.sources import Key
    from kvembed._engine import Engine
    from kvembed._forget import ForgetReport
    from kvembed._keys import TokenIds
    from kvembed._portable import ExportReport, ImportReport
    from kvembed._prompt_view import PromptView
    from kvembed._sessions.db import SessionDB
    from kvembed._stats import TierStats
    from kvembed._store import KVStore
    from kvembed._tree import PrefixTree
    from kvembed._usage import Usage

__all__ = ["model_html", "ModelView"]


class ModelView:
    """Base of `CachedModel`, apart only to keep each file short enough to be read at once."""

    hf_model: Any
    tokenizer: Any
    store: KVStore
    deterministic: bool
    library: Library
    _lock: threading.RLock
    _engine: Engine
    _usage: Usage
    _history: deque[Usage]

    # --- what is stored --------------------------------------------------------------------------------

    def recheck(self, on_progress: Callable[[int, int], object] | None = None) -> AuditReport:
        """Compute every stored block of this model and salt again, and quarantine those that differ.

        Takes as long as computing all stored texts; with several texts over one document, that document counts once
        for each run of full blocks.

        Args:
            on_progress: Called with (blocks done, blocks in all).

        Raises:
            UnsupportedModelError: This model's KV is not kept.
        """
        with self._lock:
            self._engine.check_identity()
            if self.support is not None:
                raise UnsupportedModelError(f"nothing to check: {self.support}")
            self.store.flush()
            return Auditor(self._engine, 0.0).sweep(on_progress)

    def lookup(self, prompt: Any) -> PrefixMatch:
        """Say how much of a prompt could be reused; computes nothing.

        Raises:
            PromptError: The prompt is empty.
        """
        ids = encode(self.tokenizer, prompt, media=True)
        check_prompt(self.hf_model, ids[:1])
        with self._lock:
            self._engine.check_identity()
            if self.support is not None:
                return PrefixMatch(prompt_tokens=len(ids))
            ids, media = self._with_media(prompt, ids)
            found = self._engine.match(ids, deterministic=self.deterministic, media=media)
        blocks = -(-found.live_tokens // found.block_size) + len(found.stored)
        return PrefixMatch(
            prompt_tokens=len(ids),
            num_tokens=found.tokens,
            tokens_by_tier=found.tokens_by_tier,
            exact_tokens=found.exact_tokens,
            blocks=blocks,
            lookup_s=found.seconds,
            spans=as_spans(found.runs, len(ids)),
        )

    def show_prompt(self, prompt: Any) -> PromptView:
        """Return the text of a prompt by the tier that each part would come from; computes nothing.

        Raises:
            PromptError: The prompt is empty.
        """
        from kvembed._prompt import decoder
        from kvembed._prompt_view import prompt_view

        ids = encode(self.tokenizer, prompt, media=True)
        spans = self.lookup(prompt).spans or as_spans([], len(ids))
        view = prompt_view(ids, spans, decoder(self.tokenizer))
        assert view is not None
        return view

    def prefixes(self, sessions: SessionDB | None = None) -> PrefixTree:
        """Return what the store holds as a tree, with what is live here; see `KVStore.prefixes`.

        Args:
            sessions: Sessions whose names are to stand beside what they use; by default none.
        """
        from kvembed._sessions.streams import known_texts

        # Without the lock, which a generation holds all along: people look while it runs.
        texts = known_texts(sessions) if sessions is not None else []
        return self.store.prefixes(texts, self._engine.live_tokens() if self.support is None else [])

    def tiers(self) -> tuple[TierStats, ...]:
        """Return how full every tier is, fastest first.

        On the CPU the ``live`` caches are counted in the budget of tier ``cpu`` too.
        """
        live = () if self.support is not None else (self._engine.live_stats(),)
        return (*live, *self.store.stats().tiers)

    def forget(self, what: Any, *, words: bool = True) -> ForgetReport:
        """Erase every stored block of a text that nothing else needs, with what was asked about it.

        Other texts that begin alike keep what they share. Blocks of other models and salts are not touched (see
        `KVStore.forget` and ``docs/explanation/threat-model.md`` for what stays in other processes and on the device).

        Args:
            what: A document; a session, its words included (see `Session.forget`); a text, which is looked for as a
                prompt and as a document without a system message; chat messages; or token ids.
            words: Of a session: erase its words too.

        Returns:
            What was erased, and what a scan of the store's folder found of it afterwards.

        Raises:
            PromptError: Nothing was named.
            ConfigError: It is a session of another model, or nothing of this model is cached.
            StoreReadOnlyError: The store was opened read-only.
        """
        from kvembed._sessions.session import Session
        from kvembed._texts import forget

        if words and isinstance(what, Session):
            if what._model is not self:
                raise ConfigError("it is a session of another model: call its own forget()")
            return what.forget()
        with self._lock:
            self._engine.check_identity()
            return forget(self, what)

    def export(self, path: str | os.PathLike[str], what: Any, *, plain: bool = False) -> ExportReport:
        """Write what is stored of a text to one file; see `KVStore.export`.

        A block that goes on past the text (a question about it) is cut where the text ends.

        Args:
            path: The file.
            what: As for `forget`.
            plain: Do not encrypt the file, even if the store is.

        Raises:
            ConfigError: Nothing of it is stored.
        """
        from kvembed._texts import export

        with self._lock:
            self._engine.check_identity()
            return export(self, path, what, plain)

    def import_(self, path: str | os.PathLike[str], *, pin: str | None = None, key: Key | None = None) -> ImportReport:
        """Take in blocks that this very model, under this ``cache_salt``, computed elsewhere; see `KVStore.import_`.

        Raises:
            ModelMismatchError: Another model wrote the file; says what differs.
            BlockFormatError: The file is damaged, or of another ``cache_salt``.
            StoreKeyError: It is encrypted, with another key than ``key`` or the store's.
        """
        from kvembed._texts import import_

        with self._lock:
            self._engine.check_identity()
            return import_(self, path, pin, key)

    def explain(self, prompt: Any) -> Explanation:
        """Say, in words, where a prompt leaves the nearest stored prefix and why no more of it is reused.

        Raises:
            PromptError: The prompt is empty.
        """
        ids = encode(self.tokenizer, prompt, media=True)
        check_prompt(self.hf_model, ids[:1])
        with self._lock:
            self._engine.check_identity()
            ids, media = self._with_media(prompt, ids)
            return explain_prompt(
                self._engine, self.tokenizer, ids, self.support, deterministic=self.deterministic, media=media
            )

    def _with_media(self, prompt: Any, ids: TokenIds) -> tuple[TokenIds, Media | None]:
        """Return a prompt's ids as the key chain knows them, and its media if it is a processor's output with some."""
        if not isinstance(prompt, Mapping) or not has_media(prompt):
            return ids, None
        try:
            media = read_media(self.hf_model.config, ids, prompt)
        except MediaError as error:
            raise PromptError(f"media that cannot be looked up: {error}") from None
        return media.ids, media.judged(self._engine.wrapped.media_verdict(media))

    # --- what it is ------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """What the last call cost."""
        return self._usage

    @property
    def history(self) -> tuple[Usage, ...]:
        """What the latest calls through this object cost, oldest first; at most 1,000. `kvembed.plots` draws it."""
        return tuple(self._history)

    @property
    def support(self) -> str | None:
        """Why this model is passed through uncached, or None when it is served."""
        return self._engine.refusal

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Readable parts of the model's identity; empty for a model that is not served."""
        fingerprint = self._engine.wrapped.fingerprint
        return dict(fingerprint.fields) if fingerprint is not None else {}

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV a token takes when it is stored; 0 for a model that is not served."""
        spec = self._engine.wrapped.spec
        return spec.token_nbytes if spec is not None else 0

    @property
    def block_size(self) -> int:
        """Tokens of a full block."""
        return self._engine.block_size


def model_html(model: ModelView) -> str:
    """Return what a model is, what it keeps and what the last call cost, for a notebook."""
    hf_model = model.hf_model
    parameters = sum(parameter.numel() for parameter in hf_model.parameters())
    rows: list[tuple[str, object]] = [
        ("model", f"{type(hf_model).__name__}, {format_count(parameters)} parameters, {hf_model.dtype}"),
        ("device", hf_model.device),
        ("cached", "yes" if model.support is None else f"no: {model.support}"),
        ("KV", f"{format_bytes(model.kv_bytes_per_token)} a token, blocks of {model.block_size} tokens"),
        ("store", model.store.path or "in memory"),
        ("calls", len(model.history)),
    ]
    last = [] if not model.history else [model.usage._repr_mimebundle_()["text/html"]]
    return panel("CachedModel", table_html(rows), *last)
