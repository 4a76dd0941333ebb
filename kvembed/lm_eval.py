"""The model class ``kvembed`` of lm-evaluation-harness: a context is computed once, however many answers it has.

::

    import lm_eval
    from kvembed import CachedModel
    from kvembed.lm_eval import KVEmbedLM

    model = KVEmbedLM(CachedModel.from_pretrained("smollm2"))
    results = lm_eval.simple_evaluate(model=model, tasks=["mmlu_abstract_algebra"], num_fewshot=5)
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kvembed._attach import attached
from kvembed._errors import ConfigError, PromptError
from kvembed._model import CachedModel
from kvembed._store import KVStore

try:
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("kvembed.lm_eval needs lm-evaluation-harness: pip install 'kvembed[lm-eval]'") from error

if TYPE_CHECKING:
    import os

    from kvembed._usage import Usage

__all__ = ["KVEmbedLM"]

_HFLM: Any = huggingface.HFLM  # its decorator makes it any LM for type checkers
_log = logging.getLogger(__name__)

_NOT_HERE = ("softmax_dtype", "mixed_precision_dtype", "logits_cache")


class KVEmbedLM(_HFLM):
    """The harness's ``hf`` model class with kvembed's cache below.

    Loading, tokenising, truncation, chat templates and stop strings are those of ``hf``. Log-likelihoods come from
    `CachedModel.score`: a context is prefilled once for all its continuations, and only as far as it differs from
    what is cached, which for tasks with fixed examples is the question. ``generate_until`` generates through the cache.

    Args:
        pretrained: A `CachedModel`, a loaded causal model of transformers, or what ``hf`` loads by name.
        tokenizer: Its tokenizer; by default the `CachedModel`'s, or the one that belongs to the name.
        store: Where blocks are kept: a `KVStore`, or its folder. This and the options below only where
            ``pretrained`` is no `CachedModel`, which has its own.
        deterministic: See `CachedModel`, like the options below.
        cache_salt: Isolates callers.
        block_size: Tokens of a block.
        **options: Of ``hf``, but for those of how it computes probabilities. ``batch_size`` is that of
            ``generate_until``; contexts are scored one after the other.

    Raises:
        ConfigError: An option that cannot work, or a model that is not a causal one.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        store: KVStore | str | os.PathLike[str] | None = None,
        deterministic: bool | None = None,
        cache_salt: str | None = None,
        block_size: int | None = None,
        **options: Any,
    ) -> None:
        for name in _NOT_HERE:
            if name in options:
                raise ConfigError(f"{name} is an option of the model class hf that kvembed does not have: leave it out")
        found = {"deterministic": deterministic, "cache_salt": cache_salt, "block_size": block_size, "store": store}
        of_cache = {name: value for name, value in found.items() if value is not None}
        cached = pretrained if isinstance(pretrained, CachedModel) else None
        if cached is None and not isinstance(pretrained, str):
            cached = attached(pretrained)
        if cached is not None:
            if of_cache:
                raise ConfigError(f"{', '.join(of_cache)}: this model has a cache already; set it where that is made")
            pretrained, tokenizer = cached.hf_model, tokenizer or cached.tokenizer
        super().__init__(pretrained, tokenizer=tokenizer, **options)
        if self.backend != "causal":
            raise ConfigError("kvembed scores causal models only: use the model class hf for this one")
        if cached is None:
            if store is not None and not isinstance(store, KVStore):
                of_cache["store"] = KVStore(store)
            cached = CachedModel(self._model, self.tokenizer, progress=False, **of_cache)
        self._model: Any = cached
        self._prompt_tokens = 0
        self._cached_tokens = 0

    @property
    def cached_model(self) -> CachedModel:
        """The model with its cache; close it when nothing more is to be evaluated."""
        return self._model

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all contexts scored so far."""
        return self._prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Those of them whose KV was not computed."""
        return self._cached_tokens

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results about the model, and what the cache saved."""
        return {
            **super().get_model_info(),
            "kvembed_prompt_tokens": self._prompt_tokens,
            "kvembed_cached_tokens": self._cached_tokens,
        }

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score requests, each of a pair of texts (or None), the ids of the context, and those of the continuation."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            groups[self._fitting(context, continuation)].append(index)
        answers: list[Any] = [None] * len(requests)
        with tqdm(
            total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm or self.rank != 0
        ) as bar:
            # In the order of their ids, contexts that begin alike follow each other: the cache of the last one is live.
            for context in sorted(groups):
                indices = groups[context]
                scores = self._model.score(context, [requests[index][2] for index in indices], progress=False)
                self._count(self._model.usage)
                for index, score in zip(indices, scores, strict=True):
                    answers[index] = (score.logprob, score.is_greedy)
                    if requests[index][0] is not None:  # a window of a rolling request, which the harness notes itself
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                bar.update(len(indices))
        return answers

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return a context without what does not fit on its left, as ``hf`` cuts it."""
        if not 0 < len(continuation) <= self.max_length:
            raise PromptError(
                f"a continuation of {len(continuation):,} tokens; at most {self.max_length:,} can be scored"
            )
        # The continuation's last token is not fed.
        room = self.max_length + 1 - len(continuation)
        if len(context) > room:
            _log.warning(
                "a context of %d tokens and a continuation of %d are more than the %d that fit: cut on the left",
                len(context),
                len(continuation),
                self.max_length,
            )
        return tuple(context[-room:])

    def _count(self, usage: Usage) -> None:
        self._prompt_tokens += usage.prompt_tokens
        self._cached_tokens += usage.cached_tokens


register_model("kvembed")(KVEmbedLM)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()  # the harness's own command line, which cannot know of this model class
