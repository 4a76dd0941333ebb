"""`CachedModel`: a causal LM of transformers that keeps its KV between calls, processes and reboots."""

from __future__ import annotations

import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._bypass import bypass_reason, generation_value, input_ids_of
from kvembed._call import PromptOnceStreamer, Watch, with_watch
from kvembed._document import Document
from kvembed._engine import Engine
from kvembed._errors import CacheBypassWarning, ConfigError, StoreWarning, UnsupportedModelError
from kvembed._explain import explain_prompt, miss_reason
from kvembed._keys import as_token_ids
from kvembed._match import Explanation, PrefixMatch
from kvembed._paths import is_disabled
from kvembed._progress import Progress, prefill_progress
from kvembed._prompt import check_prompt, encode
from kvembed._restore import Restore, RestoreError
from kvembed._stream import stream_text
from kvembed._usage import Usage

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from kvembed._engine import Match
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence
    from kvembed._store import KVStore

__all__ = ["CachedModel"]

_RATE_TOKENS = 64  # a prefill rate is believed when at least this many tokens were computed
_ATTEMPTS = 4


class CachedModel:
    """A drop-in around a transformers causal LM whose ``generate()`` keeps and reuses KV.

    Everything else (``config``, ``device``, ``forward`` ...) is the wrapped model's own.

    Args:
        model: The loaded model.
        tokenizer: Its tokenizer; needed for text, messages and documents.
        store: Where blocks are kept; by default one in the user's cache folder.
        deterministic: Reuse only what makes a call bit-identical to a cold one (prefixes that end on a block
            edge and were computed on the grid). Otherwise every matching token is reused, equal to rounding.
        cache_salt: Isolates callers: blocks stored under one salt are never found under another.
        block_size: Tokens of a block and of a prefill step, from 8 to 4096.
        max_live: Caches of recent sequences kept whole in memory, the fastest tier.
        progress: Progress of long prefills: True or False for a bar, ``"auto"`` for one in notebooks and
            terminals, or ``callable(done_tokens, all_tokens)``.

    Raises:
        ConfigError: An option that cannot work.

    Example:
        >>> model = CachedModel.from_pretrained("smollm2")  # doctest: +SKIP
        >>> ids = model.generate(**model.tokenizer("Hello", return_tensors="pt"))  # doctest: +SKIP
        >>> model.usage  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        store: KVStore | None = None,
        deterministic: bool = False,
        cache_salt: str = "",
        block_size: int = 256,
        max_live: int = 3,
        progress: Progress = "auto",
    ) -> None:
        if not 8 <= block_size <= 4096:
            raise ConfigError(f"block_size must be between 8 and 4096 tokens, not {block_size}")
        if max_live < 0:
            raise ConfigError(f"max_live must be 0 or more, not {max_live}")
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"CachedModel wraps a loaded model, not {type(model).__name__}; to load one by name, use CachedModel.from_pretrained")
        self._owns_store = store is None
        if store is None:
            from kvembed._store import KVStore

            store = KVStore()
        self.hf_model = model
        self.tokenizer = tokenizer
        self.store = store
        self.deterministic = deterministic
        self.progress: Progress = progress
        self._lock = threading.RLock()
        self._usage = Usage()
        self._warned: set[str] = set()
        self._engine = Engine(model, store, block_size=block_size, cache_salt=cache_salt, max_live=max_live)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        store: KVStore | None = None,
        dtype: Any = "auto",
        deterministic: bool = False,
        cache_salt: str = "",
        block_size: int = 256,
        max_live: int = 3,
        progress: Progress = "auto",
        **kwargs: Any,
    ) -> CachedModel:
        """Load a model and wrap it.

        Args:
            name: An alias (``smollm2``, ``gemma3-270m``), a hub id, a folder, or a GGUF file.
            store: See `CachedModel`.
            dtype: ``"auto"`` picks what is fast on this hardware: bfloat16 on a GPU or a processor with
                instructions for it, else float32. Or a torch dtype or its name.
            deterministic: See `CachedModel`.
            cache_salt: See `CachedModel`.
            block_size: See `CachedModel`.
            max_live: See `CachedModel`.
            progress: See `CachedModel`.
            **kwargs: Passed on to transformers' ``from_pretrained`` (``device_map``, ``revision``,
                ``attn_implementation``, ``quantization_config``, ``trust_remote_code`` ...).

        Raises:
            ModelNotFoundError: No such model; near matches are named.
        """
        from kvembed._loading.load import load

        model, tokenizer, _ = load(name, dtype=dtype, **kwargs)
        return cls(
            model,
            tokenizer,
            store=store,
            deterministic=deterministic,
            cache_salt=cache_salt,
            block_size=block_size,
            max_live=max_live,
            progress=progress,
        )

    # --- generation ------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers does: same arguments, same return type, same tokens; only less computed.

        What cannot be reused exactly is passed to transformers untouched, and ``usage.bypass_reason`` says why.
        A problem with the cache is a miss and one warning, never an error. An interrupt keeps every block that
        was finished.
        """
        with self._lock:
            return self._generate(inputs, generation_config, kwargs, None)

    def _generate(
        self, inputs: Any, generation_config: Any, kwargs: dict[str, Any], cancel: threading.Event | None
    ) -> Any:
        began = time.perf_counter()
        reason = "KVEMBED_DISABLE is set" if is_disabled() else None
        reason = reason or self.support or bypass_reason(self.hf_model, inputs, generation_config, kwargs)
        if reason is None and self.store.closed:
            reason = "the store is closed"
        if reason is not None:
            return self._pass_through(inputs, generation_config, kwargs, cancel, reason, began)
        ids = as_token_ids(input_ids_of(inputs, kwargs)[0].cpu().numpy())  # pyright: ignore[reportOptionalSubscript]
        streamer = kwargs.get("streamer")
        if streamer is not None:
            kwargs = {**kwargs, "streamer": PromptOnceStreamer(streamer)}
        for attempt in range(_ATTEMPTS):
            try:
                return self._run(ids, inputs, generation_config, kwargs, cancel, began, cold=attempt == _ATTEMPTS - 1)
            except RestoreError as error:
                self.store.discard(error.key, error.reason)
                if streamer is not None:
                    kwargs["streamer"].repeat()
        raise AssertionError("a cold attempt restores nothing")  # pragma: no cover

    def _run(
        self,
        ids: TokenIds,
        inputs: Any,
        generation_config: Any,
        kwargs: dict[str, Any],
        cancel: threading.Event | None,
        began: float,
        *,
        cold: bool,
    ) -> Any:
        engine = self._engine
        engine.check_identity()
        if engine.refusal is not None:  # the model was changed into one that cannot be served
            return self._pass_through(inputs, generation_config, kwargs, cancel, engine.refusal, began)
        found = engine.match(ids if not cold else ids[:1], deterministic=self.deterministic)
        capacity = len(ids) + self._new_tokens(len(ids), generation_config, kwargs) + engine.block_size
        sequence, restore, tiers = engine.open(found, ids, capacity)
        start = len(sequence.ids)
        watch = Watch(cancel)
        stored = 0
        finished = False
        result = None
        try:
            with prefill_progress(self.progress, start, len(ids)) as on_progress:
                stored += self._prefill(sequence, ids, on_progress)
            arguments = {**kwargs, "stopping_criteria": with_watch(kwargs.get("stopping_criteria"), watch)}
            with engine.switch.active():
                result = self.hf_model.generate(
                    inputs, generation_config=generation_config, past_key_values=sequence.cache, **arguments
                )
            if restore is not None:
                restore.finish()
            finished = True
        except RestoreError:
            sequence.ids = ids[:0]  # rows were never filled: nothing of this cache may be kept
            raise
        finally:
            if restore is not None and not finished:
                restore.cancel()
            if len(sequence.ids) or finished:
                stored += self._keep(sequence, ids, watch, result)
        self._usage = self._measure(found, ids, tiers, restore, watch, result, stored, began, generation_config)
        self._report_problems()
        return result

    def _prefill(self, sequence: LiveSequence, ids: TokenIds, on_progress: Any, *, whole: bool = False) -> int:
        stored = 0

        def put(sequence: LiveSequence, ids: TokenIds) -> None:
            nonlocal stored
            stored += self._engine.capture(sequence, tail=False)

        self._engine.prefill(sequence, ids, whole=whole, on_progress=on_progress, put=put)
        return stored

    def _new_tokens(self, prompt_tokens: int, generation_config: Any, kwargs: dict[str, Any]) -> int:
        """Tokens to make room for; a wrong guess costs a copy later, nothing else."""
        new = generation_value(self.hf_model, generation_config, kwargs, "max_new_tokens")
        if new is None:
            total = generation_value(self.hf_model, generation_config, kwargs, "max_length")
            new = max(20, (total or 0) - prompt_tokens)
        return min(int(new), 1 << 16)

    def _keep(self, sequence: LiveSequence, ids: TokenIds, watch: Watch, result: Any) -> int:
        """Store what the call has learned, and keep its cache live unless the caller received it."""
        engine = self._engine
        seen = ids
        if result is not None:
            seen = as_token_ids(getattr(result, "sequences", result)[0].cpu().numpy())
        elif watch.last is not None:
            seen = as_token_ids(watch.last[0].cpu().numpy())
        if not engine.settle(sequence, seen):
            return 0
        stored = engine.capture(sequence, tail=True)
        if result is not None and getattr(result, "past_key_values", None) is not None:
            hf.export_cache(sequence.cache)
        else:
            engine.keep(sequence)
        engine.store.touch(sequence.keys)
        return stored

    def _pass_through(
        self,
        inputs: Any,
        generation_config: Any,
        kwargs: dict[str, Any],
        cancel: threading.Event | None,
        reason: str,
        began: float,
    ) -> Any:
        ids = input_ids_of(inputs, kwargs)
        watch = Watch(cancel)
        arguments = dict(kwargs)
        # custom_generate may know nothing of stopping criteria; everything else takes them.
        if not kwargs.get("custom_generate"):
            arguments["stopping_criteria"] = with_watch(kwargs.get("stopping_criteria"), watch)
        result = self.hf_model.generate(inputs, generation_config=generation_config, **arguments)
        total = time.perf_counter() - began
        prompt = int(ids.shape[-1]) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 0
        sequences = getattr(result, "sequences", result)
        made = int(sequences.shape[-1]) - prompt if isinstance(sequences, torch.Tensor) and sequences.ndim == 2 else 0
        ttft = watch.first_token_at - began if watch.first_token_at is not None else total
        self._usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=max(0, made),
            prefill_s=ttft,
            decode_s=total - ttft,
            ttft_s=ttft,
            total_s=total,
            bypass_reason=reason,
        )
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"not cached: {reason}", CacheBypassWarning, stacklevel=4)
        return result

    def _measure(
        self,
        found: Match,
        ids: TokenIds,
        tiers: dict[str, int],
        restore: Restore | None,
        watch: Watch,
        result: Any,
        stored: int,
        began: float,
        generation_config: Any,
    ) -> Usage:
        now = time.perf_counter()
        first = watch.first_token_at if watch.first_token_at is not None else now
        ttft = first - began
        restore_s = min(restore.seconds, ttft) if restore is not None else 0.0
        cached = sum(tiers.values())
        computed = len(ids) - cached
        engine = self._engine
        # A restore overlaps with the compute, so its seconds are not taken off here.
        prefill_s = max(0.0, ttft - found.seconds)
        rate = None
        if computed >= _RATE_TOKENS and restore is None and prefill_s > 0:
            rate = computed / prefill_s
            self._note_rate(rate)
        known = engine.prefill_rate
        sequences = getattr(result, "sequences", result)
        return Usage(
            prompt_tokens=len(ids),
            completion_tokens=int(sequences.shape[-1]) - len(ids),
            cached_tokens_by_tier=tiers,
            lookup_s=found.seconds,
            restore_s=restore_s,
            prefill_s=prefill_s,
            decode_s=now - first,
            ttft_s=ttft,
            total_s=now - began,
            prefill_tokens_per_second=rate,
            saved_s=cached / known - restore_s if known and cached else None,
            miss_reason=miss_reason(engine, found, ids, cached),
            deterministic=self.deterministic,
            stored_tokens=stored,
        )

    def _note_rate(self, rate: float) -> None:
        self._engine.note_prefill_rate(rate)

    def _report_problems(self) -> None:
        problems = self.store.take_problems()
        if problems:
            warnings.warn("; ".join(problems), StoreWarning, stacklevel=5)

    # --- explicit verbs --------------------------------------------------------------------------------

    def stream(self, prompt: Any, *, max_new_tokens: int = 512, **kwargs: Any) -> Iterator[str]:
        """Generate and yield the text piece by piece.

        Args:
            prompt: Text, chat messages, or token ids.
            max_new_tokens: Most tokens to generate.
            **kwargs: Any argument of ``generate()``.

        Closing the iterator stops the generation after the current token and keeps its KV.

        Raises:
            PromptError: The prompt is empty, or does not fit the context with ``max_new_tokens``.
        """
        ids = encode(self.tokenizer, prompt)
        check_prompt(self.hf_model, ids, max_new_tokens)
        return stream_text(self, ids, max_new_tokens, kwargs)

    def document(
        self,
        text: str | os.PathLike[str],
        *,
        name: str | None = None,
        system: str | None = None,
        pin: bool = False,
        progress: Progress | None = None,
    ) -> Document:
        """Prefill a text once, to ask many questions about it.

        Args:
            text: The document, or a path to a text file (a `pathlib.Path`, or the name of an existing file).
            name: What to call it; by default the file's name, or its first words.
            system: System message placed before it, where the chat template has one.
            pin: Keep its blocks when others are evicted.
            progress: See `CachedModel`; by default this model's own.

        Raises:
            PromptError: The document is empty or does not fit the model's context.
        """
        return Document.prepare(self, text, name=name, system=system, pin=pin, progress=progress)

    def prefill(self, prompt: Any, *, progress: Progress | None = None) -> Usage:
        """Compute and store the KV of a whole prompt without generating anything.

        Returns:
            What it cost; also kept as ``usage``.

        Raises:
            PromptError: The prompt is empty or too long.
            UnsupportedModelError: This model's KV cannot be kept.
        """
        ids = encode(self.tokenizer, prompt)
        check_prompt(self.hf_model, ids, 0)
        if self.support is not None:
            raise UnsupportedModelError(f"nothing to prefill: {self.support}")
        with self._lock:
            began = time.perf_counter()
            for attempt in range(_ATTEMPTS):
                try:
                    return self._prefill_once(ids, progress, began, cold=attempt == _ATTEMPTS - 1)
                except RestoreError as error:
                    self.store.discard(error.key, error.reason)
        raise AssertionError("a cold attempt restores nothing")  # pragma: no cover

    def _prefill_once(self, ids: TokenIds, progress: Progress | None, began: float, *, cold: bool) -> Usage:
        engine = self._engine
        engine.check_identity()
        # One id more than there is, so that the last token may be found stored too.
        probe = as_token_ids([*ids.tolist(), 0]) if not cold else ids[:1]
        found = engine.match(probe, deterministic=self.deterministic)
        sequence, restore, tiers = engine.open(found, ids, len(ids) + 2 * engine.block_size)
        stored = 0
        complete = False
        try:
            shown = self.progress if progress is None else progress
            with prefill_progress(shown, len(sequence.ids), len(ids)) as on_progress:
                stored = self._prefill(sequence, ids, on_progress, whole=True)
            if restore is not None:
                restore.finish()
            complete = True
        except RestoreError:
            sequence.ids = ids[:0]
            raise
        finally:
            if restore is not None and not complete:
                restore.cancel()
            if len(sequence.ids):
                stored += self._keep(sequence, ids, Watch(), None)
        total = time.perf_counter() - began
        cached = sum(tiers.values())
        computed = len(ids) - cached
        rate = computed / total if computed >= _RATE_TOKENS and restore is None else None
        if rate:
            self._note_rate(rate)
        self._usage = Usage(
            prompt_tokens=len(ids),
            cached_tokens_by_tier=tiers,
            lookup_s=found.seconds,
            restore_s=restore.seconds if restore is not None else 0.0,
            prefill_s=total - found.seconds,
            total_s=total,
            prefill_tokens_per_second=rate,
            deterministic=self.deterministic,
            stored_tokens=stored,
        )
        self._report_problems()
        return self._usage

    def lookup(self, prompt: Any) -> PrefixMatch:
        """Say how much of a prompt could be reused; computes nothing.

        Raises:
            PromptError: The prompt is empty.
        """
        ids = encode(self.tokenizer, prompt)
        check_prompt(self.hf_model, ids[:1])
        if self.support is not None:
            return PrefixMatch(prompt_tokens=len(ids))
        with self._lock:
            self._engine.check_identity()
            found = self._engine.match(ids, deterministic=self.deterministic)
        blocks = -(-found.live_tokens // found.block_size) + len(found.stored)
        return PrefixMatch(
            prompt_tokens=len(ids),
            num_tokens=found.tokens,
            tokens_by_tier=found.tokens_by_tier,
            exact_tokens=found.exact_tokens,
            blocks=blocks,
            lookup_s=found.seconds,
        )

    def explain(self, prompt: Any) -> Explanation:
        """Say, in words, where a prompt leaves the nearest stored prefix and why no more of it is reused.

        Raises:
            PromptError: The prompt is empty.
        """
        ids = encode(self.tokenizer, prompt)
        check_prompt(self.hf_model, ids[:1])
        with self._lock:
            return explain_prompt(self._engine, self.tokenizer, ids, self.support, deterministic=self.deterministic)

    # --- the rest --------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """What the last call cost."""
        return self._usage

    @property
    def support(self) -> str | None:
        """Why this model is passed through uncached, or None when it is served."""
        return self._engine.refusal

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Readable parts of the model's identity; empty for a model that is not served."""
        return dict(self._engine.fingerprint.fields) if self._engine.fingerprint is not None else {}

    @property
    def block_size(self) -> int:
        """Tokens of a full block."""
        return self._engine.block_size

    def refresh(self) -> None:
        """Take the full weights checksum now.

        Only needed after an edit that the scan before each call cannot see: through ``.data`` or NumPy, of a few
        single elements.
        """
        with self._lock:
            self._engine.refresh()

    def drop_live(self) -> None:
        """Release the caches of recent sequences; their blocks stay in the other tiers."""
        with self._lock:
            self._engine.drop_live()

    def close(self) -> None:
        """Write what is pending, release memory, and close the store if this model opened it."""
        with self._lock:
            self._engine.close()
            if self._owns_store:
                self.store.close()
            elif not self.store.closed:
                self.store.flush()

    def __enter__(self) -> CachedModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model's forward, untouched."""
        return self.hf_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Reached only for names this class lacks. Dunder and private names are not forwarded, so that copying and
        # pickling do not mistake the wrapped model's methods for ours.
        if name.startswith("_") or "hf_model" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.hf_model, name)

    def __repr__(self) -> str:
        state = "cached" if self.support is None else f"passed through: {self.support}"
        return f"<CachedModel {type(self.hf_model).__name__} {self.hf_model.dtype} on {self.hf_model.device}, {state}, store {self.store.path}>"
