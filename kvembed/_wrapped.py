"""`WrappedModel`: a transformers model, the shape of its cache, its identity, and whether it may be served."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._attention import AttentionSwitch
from kvembed._compiled import uncompiled
from kvembed._errors import UnsupportedModelError
from kvembed._fingerprint import Fingerprint, adapter_refusal
from kvembed._media_trial import MediaVerdict
from kvembed._oracle import OracleVerdict, run_oracle, static_refusal, trial_ids

if TYPE_CHECKING:
    from kvembed._cachespec import CacheSpec
    from kvembed._media import Media
    from kvembed._store import KVStore

__all__ = ["WrappedModel"]


class WrappedModel:
    """What the engine needs to know of a model.

    Args:
        model: A transformers causal LM.
        store: Where its namespace, and notes about it, are kept.
        block_size: Tokens of a full block.

    Attributes:
        spec: Shape of the cache; None for a model that is not served.
        fingerprint: Identity; None likewise.
        refusal: Why the model is passed through, or None.
        verdict: What the trial found.
        switch: Puts the grouped attention path under the model while it runs.
        cache_name: The argument of ``forward()`` and ``generate()`` that takes a cache.
    """

    def __init__(self, model: Any, store: KVStore, block_size: int) -> None:
        self.model = model
        self._store = store
        self._block_size = block_size
        self.switch = AttentionSwitch(model, block_size)
        self._forward_arguments = self._find_forward_arguments()
        self._headless = False
        self.spec: CacheSpec | None = None
        self.fingerprint: Fingerprint | None = None
        self._last_fingerprint: Fingerprint | None = None
        self.refusal: str | None = None
        self.verdict: OracleVerdict | None = None
        self._prepare()

    def _find_forward_arguments(self) -> frozenset[str]:
        names = inspect.signature(self.model.forward).parameters
        # transformers calls the cache of Mamba models by another name.
        self.cache_name = "cache_params" if "cache_params" in names else "past_key_values"
        return frozenset(n for n in ("position_ids", "logits_to_keep", "attention_mask") if n in names)

    def _prepare(self) -> None:
        """Probe the cache, take the fingerprint, and try reuse once (or read how the trial ended before)."""
        self._moving: list[Any] = [module for module in self.model.modules() if "rope_deltas" in vars(module)]
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        # With dropout (a model in training mode) the trial draws random numbers, which the caller must not notice.
        with torch.random.fork_rng(devices=cuda):
            self._try_out()

    def _try_out(self) -> None:
        self.refusal = static_refusal(self.model)
        if self.refusal is None:
            try:
                self.spec = hf.probe_cache_spec(self._probe(), self._block_size)
            except UnsupportedModelError as error:
                self.refusal = str(error)
            except Exception as error:  # a model we know nothing of: whatever it raises is its refusal
                self.refusal = f"a one-token forward with a DynamicCache failed ({type(error).__name__}: {error})"
        if self.spec is None:
            return
        self.fingerprint = Fingerprint(self.model, self.attn_implementation, self.spec.kinds, self._block_size)
        self._adopt_fingerprint()

    def _probe(self) -> Any:
        """Return a stock cache filled by a one-token forward, which also shows whether logits can be left out."""
        cache = hf.new_stock_cache(self.model.config)
        first = trial_ids(self.model)[:, :1]
        self._headless = "logits_to_keep" in self._forward_arguments
        try:
            self.forward(first, 0, cache, switch=False, logits=0)
        except Exception:  # a model that takes only a number there, or that fails anyhow: the next line tells
            self._headless = False
            cache = hf.new_stock_cache(self.model.config)
            self.forward(first, 0, cache, switch=False)
        return cache

    def _adopt_fingerprint(self) -> None:
        assert self.fingerprint is not None
        assert self.spec is not None
        digest = self.fingerprint.digest
        self._store.register_namespace(digest, dict(self.fingerprint.fields))
        noted = self._store.get_note(digest, "oracle")
        if isinstance(noted, dict) and set(noted) == {f.name for f in fields(OracleVerdict)}:
            self.verdict = OracleVerdict(**noted)
            self.switch.enabled = self.verdict.grouped_attention
        else:
            self.switch.enabled = True
            try:
                self.verdict = run_oracle(self.model, self.spec, self.switch, self._logits)
            except Exception as error:
                # An answer for now. It is not kept: memory may have been short, or a library half installed.
                self.verdict = OracleVerdict(f"the trial failed ({type(error).__name__}: {error})", False, float("inf"))
            else:
                self._store.set_note(digest, "oracle", vars(self.verdict))
        self.refusal = self.verdict.reason or adapter_refusal(self.model)

    def media_verdict(self, media: Media) -> MediaVerdict:
        """Return what is known of how the model treats such media."""
        noted = self._media_notes.get(media.signature)
        known = {f.name for f in fields(MediaVerdict)}
        return MediaVerdict(**noted) if isinstance(noted, dict) and set(noted) == known else MediaVerdict()

    def note_media(self, media: Media, verdict: MediaVerdict) -> None:
        """Remember what was found."""
        if self.fingerprint is not None:
            notes = {**self._media_notes, media.signature: verdict.as_note()}
            self._store.set_note(self.fingerprint.digest, "media", notes)

    @property
    def _media_notes(self) -> dict[str, Any]:
        noted = self._store.get_note(self.fingerprint.digest, "media") if self.fingerprint is not None else None
        return noted if isinstance(noted, dict) else {}

    def forget_media(self) -> None:
        """Drop what an earlier call with pictures left on the modules.

        Qwen-VL models keep how far an image moved the positions, and add it to those of any later call whose cache
        is not empty: a text call of ours after an image call of the user's.
        """
        for module in self._moving:
            module.rope_deltas = None

    @property
    def wide_steps(self) -> bool | None:
        """Whether one forward of several blocks gives the bits of one forward each; None when nobody has looked."""
        if self.fingerprint is None or not self._may_step_wide:
            return False
        known = self._store.get_note(self.fingerprint.digest, "wide_steps")
        return known if isinstance(known, bool) else None

    def note_wide_steps(self, same: bool) -> None:
        """Remember what was found."""
        if self.fingerprint is not None:
            self._store.set_note(self.fingerprint.digest, "wide_steps", same)

    @property
    def _may_step_wide(self) -> bool:
        assert self.spec is not None
        # Experts get as many tokens as are routed to them: another number in a wider step.
        return (
            self.switch.enabled
            and self.model.device.type == "cpu"
            and self.spec.full_only
            and self.attn_implementation == "sdpa"
            and not any("expert" in name for name, _ in self.model.named_modules())
        )

    @property
    def compiled(self) -> bool:
        """True when the model, or a part of it, was compiled in place, as of the last look for changes."""
        return self.fingerprint is not None and self.fingerprint.compiled

    @property
    def stepwise(self) -> bool:
        """True when a prefix can only be continued one token at a time."""
        return self.verdict is not None and self.verdict.stepwise

    @property
    def prefill_rate(self) -> float | None:
        """Tokens a second of a cold prefill on this machine, measured before; None until then."""
        if self.fingerprint is None:
            return None
        rate = self._store.get_note(self.fingerprint.digest, "prefill_tokens_per_second")
        return float(rate) if isinstance(rate, int | float) else None

    def note_prefill_rate(self, rate: float) -> None:
        """Remember a measured rate; a running mean, so that one noisy call does not stand for the machine."""
        known = self.prefill_rate
        value = rate if known is None else 0.7 * known + 0.3 * rate
        if self.fingerprint is not None:
            self._store.set_note(self.fingerprint.digest, "prefill_tokens_per_second", value)

    @property
    def attn_implementation(self) -> str:
        """What the user chose; kvembed's own name is never set between calls."""
        return str(getattr(self.model.config.get_text_config(decoder=True), "_attn_implementation", "eager"))

    def noticed_change(self) -> bool:
        """Notice weights, adapters or settings that changed since the last call, and take the new identity.

        Returns:
            True when the model is another one now.
        """
        watched = self.fingerprint or self._last_fingerprint
        if watched is None:
            return False
        # A model may have been refused because every forward changes a buffer: it must not be tried at every call.
        changed = watched.changed(self.attn_implementation, tensors=self.refusal is None)
        return changed and self.refresh()

    def refresh(self) -> bool:
        """Take the full fingerprint again; True when the model is another one now."""
        watched = self.fingerprint or self._last_fingerprint
        if watched is not None:
            before = watched.digest
            watched.refresh(self.attn_implementation)
            if watched.digest == before:
                return False
        # The dtype or device may be another one too, so the cache is probed again.
        self.spec = self.fingerprint = None
        self._last_fingerprint = watched  # should it be refused now, this one sees it change again
        self._prepare()
        return True

    def forward(self, ids: torch.Tensor, start: int, cache: Any, *, switch: bool = True, logits: int = 1) -> Any:
        """Run tokens ``[1, n]`` from position ``start`` on, appending to ``cache``.

        Args:
            ids: Token ids.
            start: Position of the first one.
            cache: Holds the tokens before it.
            switch: Use the grouped attention path (when it is enabled).
            logits: Compute those of so many last tokens, where the model can be told. A prefill needs none, and the
                head of a small model with a large vocabulary is a fifth of its weights.
        """
        arguments: dict[str, Any] = {self.cache_name: cache, "use_cache": True, "return_dict": True}
        if "position_ids" in self._forward_arguments:
            arguments["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        if "logits_to_keep" in self._forward_arguments:
            none = torch.empty(0, dtype=torch.long) if self._headless else 1
            arguments["logits_to_keep"] = logits or none
        # Before there is a fingerprint nobody has looked.
        as_written = nullcontext() if self.fingerprint and not self.compiled else uncompiled(self.model)
        with torch.no_grad(), as_written:
            if switch:
                with self.switch.active():
                    return self.model(input_ids=ids, **arguments)
            return self.model(input_ids=ids, **arguments)

    def _logits(self, ids: torch.Tensor, start: int, cache: Any, last: int) -> torch.Tensor:
        # The oracle decides itself when the grouped path is on.
        logits = self.forward(ids, start, cache, switch=False, logits=last).logits
        return logits[:, logits.shape[1] - last :].float()
