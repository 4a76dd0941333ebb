"""A trial of pictures (and video, and sound), at the first call that brings one: is reuse right with them too?

Text alone shows nothing of how a model treats media: some attend to a whole prompt in both directions when there
is a picture, some keep positions on their modules, some insist on all pictures at every call. So the first prompt with
media is computed once in one go by transformers, and once in two calls, with the cut after the media and (if
something comes before them) right before the last of them. What disagrees is not reused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._call import first_step
from kvembed._media import TYPE_ARGUMENTS
from kvembed._oracle import error_limit, relative_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvembed._media import Media
    from kvembed._wrapped import WrappedModel

__all__ = ["MediaVerdict", "try_media"]


@dataclass(frozen=True)
class MediaVerdict:
    """What is known of a model's media: True, False, or None while no prompt has shown it.

    Args:
        follows: Text on top of cached media gives the logits of one forward.
        resumes: Media on top of a filled cache do.
    """

    follows: bool | None = None
    resumes: bool | None = None

    def as_note(self) -> dict[str, bool | None]:
        """Return it as JSON types."""
        return asdict(self)


def try_media(
    wrapped: WrappedModel, known: MediaVerdict, ids: torch.Tensor, media: Media, arguments: Mapping[str, Any]
) -> MediaVerdict:
    """Find out what is not known yet, as far as this prompt shows it.

    Args:
        wrapped: The model.
        known: What earlier prompts have shown.
        ids: The prompt, ``[1, n]``.
        media: Its media.
        arguments: The caller's arguments of ``generate()``.
    """
    n = ids.shape[1]
    # Half of the text after the media on either side: a model that looks at all of a prompt from everywhere must have
    # something to see that was not there before.
    after = max(media.end, (media.end + n) // 2) if known.follows is None and media.end < n else None
    before = media.units[-1].start if known.resumes is None and media.is_divisible else 0
    if after is None and not before:
        return known
    types = {name: arguments[name] for name in TYPE_ARGUMENTS if arguments.get(name) is not None}

    def logits(upto: int, cache: Any, cut: int) -> torch.Tensor:
        wrapped.forget_media()
        part = {name: value[:, :upto] for name, value in types.items()}
        with first_step(wrapped.model, skip=cut, replace=media.part(cut, upto) if cut else None):
            result = wrapped.model.generate(
                ids[:, :upto],
                generation_config=_one_token(wrapped.model),
                attention_mask=torch.ones_like(ids[:, :upto]),
                **{wrapped.cache_name: cache},
                **part,
                **media.part(0, upto),
            )
        return result.logits[0].float()

    limit = error_limit(wrapped.model)
    plain = logits(n, hf.new_stock_cache(wrapped.model.config), 0)

    def holds(cut: int) -> bool:
        assert wrapped.spec is not None
        cache = hf.new_cache(wrapped.spec, wrapped.model.config, n + 1)
        try:
            with wrapped.switch.active():
                logits(cut, cache, 0)
                return relative_error(plain, logits(n, cache, cut)) <= limit
        except Exception:  # a model that cannot do this at all: it is not asked to
            return False

    return MediaVerdict(
        known.follows if after is None else holds(after), known.resumes if not before else holds(before)
    )


def _one_token(model: Any) -> Any:
    from transformers import GenerationConfig

    settings = {name: getattr(model.generation_config, name, None) for name in ("bos_token_id", "pad_token_id")}
    return GenerationConfig(
        max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, **settings
    )
