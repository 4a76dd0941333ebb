"""A trial of pictures (and video, and sound), at the first call that brings some: is reuse right with them too?

Text alone shows nothing of how a model treats media: some attend to a whole prompt in both directions when there
is a picture, some keep positions on their modules, some insist on all pictures at every call. So the first prompt with
media is computed once in one go by transformers, and once more in two calls for each place where a prompt may be
taken up: after the media, before the first of them, and between them. Logits of the last token and the keys and
values of all layers have to agree; the latter feel a picture also where the former hardly do. What disagrees is
not reused. The findings hold for calls that bring the same arguments: a model may be right with pictures and wrong with
sound, or with ``token_type_ids`` and without.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._call import first_step
from kvembed._keys import as_token_ids
from kvembed._media import MediaError, read_media
from kvembed._oracle import error_limit, relative_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvembed._media import Media
    from kvembed._wrapped import WrappedModel

__all__ = ["MediaVerdict", "note_failure", "tried_media"]

_MOST_ERROR_OF_ROWS_HALF = 5e-2


@dataclass(frozen=True)
class MediaVerdict:
    """What is known of a model's media: True, False, or None while no prompt has shown it.

    Args:
        follows: Text on top of cached media gives what one forward does.
        resumes: Media on top of cached text do.
        between: Media on top of cached media do.
    """

    follows: bool | None = None
    resumes: bool | None = None
    between: bool | None = None

    def as_note(self) -> dict[str, bool | None]:
        """Return it as JSON types."""
        return asdict(self)


def tried_media(wrapped: WrappedModel, prompt: torch.Tensor, arguments: Mapping[str, Any]) -> Media:
    """Return a prompt's media, and what is known of them; finds out what is not.

    Args:
        wrapped: The model.
        prompt: Ids, ``[1, n]``.
        arguments: The caller's arguments of ``generate()``.

    Raises:
        MediaError: They cannot be reused; the text says why.
    """
    if wrapped.stepwise:
        raise MediaError("media, with a model that can go on only one token at a time")
    media = read_media(wrapped.model.config, as_token_ids(prompt[0].cpu().numpy()), arguments)
    known = wrapped.media_verdict(media)
    cuda = [wrapped.model.device] if wrapped.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # with dropout a trial draws numbers, which the caller must not notice
        verdict = _try_media(wrapped, known, prompt, media)
    if verdict != known:
        wrapped.note_media(media, verdict)
        wrapped.forget_media()
    if verdict.follows is False:
        raise MediaError("with media this model gives other text in two calls than in one")
    return media.judged(verdict)


def note_failure(wrapped: WrappedModel, media: Media, error: Exception) -> None:
    """A call failed on top of what was reused, and not without: do not reuse media of such calls again."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
        wrapped.note_media(media, MediaVerdict(False, False, False))


def _try_media(wrapped: WrappedModel, known: MediaVerdict, ids: torch.Tensor, media: Media) -> MediaVerdict:
    """Find out what is not known yet, as far as this prompt shows it."""
    n = ids.shape[1]
    cuts: dict[str, int] = {}
    if known.follows is None and media.end < n:
        # Half of the text after the media on either side: a model that looks at all of a prompt from everywhere must
        # have something to see that was not there before.
        cuts["follows"] = (media.end + n) // 2
    if known.resumes is None and media.start:
        cuts["resumes"] = media.start
    if known.between is None and len(media.units) > 1 and media.is_divisible:
        cuts["between"] = media.units[-1].start
    if not cuts:
        return known
    trial = _Trial(wrapped, ids, media)
    return replace(known, **{name: trial.holds(cut, by_text=name == "resumes") for name, cut in cuts.items()})


class _Trial:
    """One prompt, computed in one go, and in two."""

    def __init__(self, wrapped: WrappedModel, ids: torch.Tensor, media: Media) -> None:
        self._wrapped, self._ids, self._media = wrapped, ids, media
        self._plain: Any = hf.new_stock_cache(wrapped.model.config)
        self._logits = self._compute(ids.shape[1], self._plain, 0)

    def holds(self, cut: int, *, by_text: bool) -> bool:
        """Return whether computing up to ``cut`` and then the rest agrees with computing all at once.

        Args:
            cut: Where.
            by_text: Compute the first part as `kvembed._prefill` computes text, without a word about media.
        """
        wrapped, n = self._wrapped, self._ids.shape[1]
        assert wrapped.spec is not None
        cache = hf.new_cache(wrapped.spec, wrapped.model.config, n + 1)
        try:
            with wrapped.switch.active():
                if by_text:
                    wrapped.forward(self._ids[:, :cut], 0, cache, logits=0)
                else:
                    self._compute(cut, cache, 0)
                found = self._compute(n, cache, cut)
        except Exception:  # a model that cannot do this at all: it is not asked to
            return False
        # "<=" rather than a "not >": a NaN must not pass.
        return relative_error(self._logits, found) <= error_limit(wrapped.model) and self._same_rows(cache)

    def _compute(self, upto: int, cache: Any, cut: int) -> torch.Tensor:
        wrapped, ids = self._wrapped, self._ids[:, :upto]
        wrapped.forget_media()
        types = {name: value[:, :upto] for name, value in self._media.types.items()}
        with first_step(wrapped.model, skip=cut, replace=self._media.part(cut, upto) if cut else None):
            result = wrapped.model.generate(
                ids,
                generation_config=_one_token(wrapped.model),
                attention_mask=torch.ones_like(ids),
                **{wrapped.cache_name: cache},
                **types,
                **self._media.part(0, upto),
            )
        return result.logits[0].float()

    def _same_rows(self, cache: Any) -> bool:
        n, model = self._ids.shape[1], self._wrapped.model
        ours = hf.layers_of(cache)
        for plain, layer in zip(self._plain.layers, cache.layers, strict=True):
            if layer not in ours:
                continue
            kept = plain.keys.shape[-2]  # a sliding layer of transformers keeps no more than its window
            pairs = zip((plain.keys, plain.values), layer.rows(n - kept, n), strict=True)
            if not all(_same(model, a.float(), b.float()) for a, b in pairs):
                return False
        return True


def _same(model: Any, plain: torch.Tensor, found: torch.Tensor) -> bool:
    if model.dtype in (torch.float32, torch.float64):
        return relative_error(plain, found) <= error_limit(model)
    # In half precision single values round too far; a picture in the wrong place moves all of them.
    return float((found - plain).norm()) <= _MOST_ERROR_OF_ROWS_HALF * (float(plain.norm()) or 1.0)


def _one_token(model: Any) -> Any:
    from transformers import GenerationConfig

    settings = {name: getattr(model.generation_config, name, None) for name in ("bos_token_id", "pad_token_id")}
    return GenerationConfig(
        max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, **settings
    )
