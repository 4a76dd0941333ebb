"""`CachedModel`: a causal LM of transformers that keeps its KV between calls, processes and reboots."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._attempt import Request
from kvembed._bypass import is_draft
from kvembed._compiled import compiled_from
from kvembed._documents.document import Document
from kvembed._documents.library import Library
from kvembed._documents.reading import read_document
from kvembed._engine import Engine
from kvembed._errors import ConfigError, StoreClosedError, UnsupportedModelError
from kvembed._html import mimebundle
from kvembed._model_view import ModelView, model_html
from kvembed._paths import is_disabled
from kvembed._prompt import check_prompt, encode
from kvembed._runner import Runner
from kvembed._score import continuation_ids, score_plainly
from kvembed._stream import stream_text
from kvembed._usage import Usage

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator, Sequence

    from kvembed._documents.parts import Parts
    from kvembed._documents.reading import Source
    from kvembed._progress import Progress
    from kvembed._score import Score
    from kvembed._sessions.db import SessionDB
    from kvembed._sessions.marks import Marks
    from kvembed._sessions.session import Session
    from kvembed._store import KVStore

__all__ = ["CachedModel"]

_MOST_HISTORY = 1000


class CachedModel(ModelView):
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
        audit: Part of the calls with stored blocks, from 0 to 1, in which a block is computed again and compared. One
            that differs is quarantined, with a warning, and the call answers without it.
        progress: Progress of long prefills: True or False for a bar, ``"auto"`` for one in notebooks and
            terminals, or ``callable(done_tokens, all_tokens)``.

    Raises:
        ConfigError: An option that cannot work, or a transformers that is too old.

    Examples:
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
        audit: float = 0.0,
        progress: Progress = "auto",
    ) -> None:
        hf.check_version()
        if not 8 <= block_size <= 4096:
            raise ConfigError(f"block_size must be between 8 and 4096 tokens, not {block_size}")
        if max_live < 0:
            raise ConfigError(f"max_live must be 0 or more, not {max_live}")
        if not 0.0 <= audit <= 1.0:
            raise ConfigError(f"audit is a part of all calls, from 0 to 1, not {audit}")
        if not isinstance(cache_salt, str):
            raise ConfigError(f"cache_salt must be text, not {type(cache_salt).__name__}")
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(
                f"CachedModel wraps a loaded model, not {type(model).__name__}; to load one by name, use "
                "CachedModel.from_pretrained"
            )
        if not hasattr(model, "generate") or not hasattr(model, "config"):
            raise ConfigError(f"{type(model).__name__} has no generate(): pass a causal language model of transformers")
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
        self._history: deque[Usage] = deque(maxlen=_MOST_HISTORY)
        self.library = Library(self)
        self._engine = Engine(
            compiled_from(model), store, block_size=block_size, cache_salt=cache_salt, max_live=max_live
        )
        self._runner = Runner(self._engine, audit)
        self._marks: Marks | None = None

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
        audit: float = 0.0,
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
            audit: See `CachedModel`.
            progress: See `CachedModel`.
            **kwargs: Passed on to transformers' ``from_pretrained`` (``device_map``, ``revision``,
                ``attn_implementation``, ``quantization_config``, ``trust_remote_code`` ...).

        Raises:
            ModelNotFoundError: No such model; near matches are named.
        """
        from kvembed._loading.load import load

        hf.check_version()  # before anything is downloaded
        model, tokenizer, _ = load(name, dtype=dtype, **kwargs)
        return cls(
            model,
            tokenizer,
            store=store,
            deterministic=deterministic,
            cache_salt=cache_salt,
            block_size=block_size,
            max_live=max_live,
            audit=audit,
            progress=progress,
        )

    # --- generation ------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers does: same arguments, same return type, same tokens; only less computed.

        What cannot be reused exactly is passed to transformers untouched, and ``usage.bypass_reason`` says why.
        A problem with the cache is a miss and one warning, never an error. An interrupt keeps every block that
        was finished.
        """
        return self._generate(inputs, generation_config, kwargs)

    def _generate(
        self,
        inputs: Any,
        generation_config: Any,
        kwargs: dict[str, Any],
        cancel: threading.Event | None = None,
        state_at: int | None = None,
    ) -> Any:
        if is_draft(generation_config) and kwargs.get("past_key_values") is not None:
            # As an assistant: the first drafts of this prompt went through the cache, and handed it out.
            return self._engine.model.generate(inputs, generation_config, **kwargs)
        assistant = kwargs.get("assistant_model")
        shared = (self.deterministic, self.progress, cancel, state_at)
        if assistant is None:
            return self._run(Request(inputs, generation_config, kwargs, *shared))
        from kvembed._attach import real_assistant

        with real_assistant(self._engine.model, assistant) as model:
            return self._run(Request(inputs, generation_config, {**kwargs, "assistant_model": model}, *shared))

    def _run(self, request: Request) -> Any:
        with self._lock:
            result, usage = self._runner.generate(request, self._refusal())
            self._note(usage)
            return result

    def _note(self, usage: Usage) -> Usage:
        self._usage = usage
        self._history.append(usage)
        with contextlib.suppress(StoreClosedError):
            self.store.record(usage)
        return usage

    def _refusal(self) -> str | None:
        """Return why nothing can be served now, whatever the model."""
        if is_disabled():
            return "KVEMBED_DISABLE is set"
        return "the store is closed" if self.store.closed else None

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
        source: Source,
        *,
        name: str | None = None,
        system: str | None = None,
        pin: bool = False,
        prefill: bool = True,
        progress: Progress | None = None,
    ) -> Document:
        """Prefill a text once, to ask many questions about it.

        Should that be interrupted, what was computed stays, and the same call goes on there, also in a new process.

        Args:
            source: The document: a text; the path of a file (a `pathlib.Path`, or the name of an existing file); or a
                list of these, which is put together with a heading for each. Read are text of any encoding, Markdown,
                source code, and with ``pip install "kvembed[documents]"`` HTML, PDF, Word (.docx) and notebooks.
            name: What to call it. A named document is kept in `library`, to be opened without its file. By default the
                file's name, or for a text some digits made from it, and then it is in no library. A pinned document's
                name is written to the catalog, so let it say no more than a file name may.
            system: System message placed before it, where the chat template has one.
            pin: Keep its blocks when others are evicted.
            prefill: Compute and store its KV now; False leaves that to the first question.
            progress: See `CachedModel`; by default this model's own.

        Raises:
            PromptError: The document is empty, or does not fit the model's context. Nothing was computed.
            ConfigError: A file is missing, damaged, locked or of a kind that cannot be read; it says what to do.
        """
        content = read_document(source)
        return Document.of(self, content, name=name, system=system, pin=pin, prefill=prefill, progress=progress)

    def documents(
        self,
        source: Source,
        *,
        name: str | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
        overlap: int = 0,
        pin: bool = False,
        prefill: bool = True,
        progress: Progress | None = None,
    ) -> Parts:
        """Prefill a text that is longer than the context as several documents, each of which fits.

        It is cut before headings, else between paragraphs, lines, sentences or words.

        Args:
            source: As for `document`, and likewise the arguments that are not here.
            name: What to call the whole; its parts are "name (1 of 3)" in the `library`.
            system: See `document`.
            max_tokens: Most tokens of a part; by default what the context leaves for a question and an answer.
            overlap: Tokens at the end of a part that the next one begins with again, so that what stands at a border is
                in one of them whole.
            pin: See `document`.
            prefill: See `document`.
            progress: See `document`.

        Raises:
            ConfigError: ``max_tokens`` or ``overlap`` cannot work; and as for `document`.
        """
        from kvembed._documents.parts import Split, prepare_parts

        split = Split(max_tokens, overlap)
        return prepare_parts(self, source, split, name=name, system=system, pin=pin, prefill=prefill, progress=progress)

    def session(
        self,
        name: str,
        *,
        system: str | None = None,
        when_full: str = "refuse",
        template_kwargs: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        db: SessionDB | None = None,
    ) -> Session:
        """Open a conversation by name, made when it is new; in another process it goes on where it was.

        Args:
            name: What it is called.
            system: System message; None for the one it has.
            when_full: ``"refuse"``, or ``"drop"`` the oldest turns, when it does not fit the context any more.
            template_kwargs: Further arguments of the chat template, such as ``enable_thinking``; kept with the
                session, and None for those it has.
            settings: Arguments of ``generate()`` for every reply of a new session.
            db: Where sessions are kept; by default one file in the user's data folder.

        Raises:
            ConfigError: There is no chat template, or the session has another system message.
        """
        from kvembed._sessions.session import Session

        return Session(
            self,
            name,
            system=system,
            db=db,
            when_full=when_full,
            template_kwargs=template_kwargs,
            settings=settings,
        )

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
        with self._lock:
            self._engine.check_identity()
            if self.support is not None:
                raise UnsupportedModelError(f"nothing to prefill: {self.support}")
            shown = self.progress if progress is None else progress
            return self._note(self._runner.prefill(ids, deterministic=self.deterministic, progress=shown))

    def score(self, prompt: Any, continuations: Sequence[Any], *, progress: Progress | None = None) -> list[Score]:
        """Return the log-probabilities of continuations of a prompt, which is computed once and kept.

        Args:
            prompt: Text, chat messages, or token ids.
            continuations: Text or token ids of each.
            progress: See `CachedModel`; by default this model's own.

        Raises:
            PromptError: The prompt or a continuation is empty, or both do not fit the context together.
        """
        ids = encode(self.tokenizer, prompt)
        check_prompt(self.hf_model, ids, 0)
        parts = [continuation_ids(self.tokenizer, prompt, ids, continuation) for continuation in continuations]
        if not parts:
            return []
        check_prompt(self.hf_model, ids, max(len(part) for part in parts) - 1)
        with self._lock:
            refusal = self._refusal()
            if refusal is None:
                self._engine.check_identity()
                refusal = self.support
            if refusal is not None:
                self._usage = Usage(prompt_tokens=len(ids), bypass_reason=refusal)
                return score_plainly(self.hf_model, ids, parts)
            shown = self.progress if progress is None else progress
            scores, usage = self._runner.score(ids, parts, deterministic=self.deterministic, progress=shown)
            self._note(usage)
            return scores

    # --- the rest --------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Take the full weights checksum now.

        Only needed after an edit that the scan before each call cannot see: through ``.data`` or NumPy, of a few
        single elements.
        """
        with self._lock:
            self._engine.refresh()

    def drop_live(self, *, release: bool = False) -> None:
        """Drop the caches of recent sequences; their blocks stay in the other tiers.

        Args:
            release: Give their memory back to the system, rather than keep it for the next caches.
        """
        with self._lock:
            self._engine.drop_live()
            if release:
                self._engine.release_memory()

    def close(self) -> None:
        """Write what is pending, release memory, and close the store if this model opened it."""
        self.library.close()
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
        model = self.hf_model
        return f"<CachedModel {type(model).__name__} {model.dtype} on {model.device}, {state}, store {self.store.path}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        return mimebundle(repr(self), model_html(self), include, exclude)
