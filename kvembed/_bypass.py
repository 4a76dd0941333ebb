"""Which calls are handed to transformers untouched, and why.

Only what is proved exact is reused. Everything else passes through with a reason a person can read; several of
these go *silently wrong* in transformers when they are given a filled cache (assisted generation and prompt
lookup never slice their first step; a cache as long as the prompt feeds the prompt twice).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvembed import hf
from kvembed._compiled import is_compiled
from kvembed._media import MEDIA_ARGUMENTS, TYPE_ARGUMENTS, has_media

if TYPE_CHECKING:
    import torch

__all__ = ["bypass_reason", "copies_of_prompt", "generation_value", "input_ids_of", "is_assisted", "is_draft"]

_KNOWN_ARGUMENTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "streamer",
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "tokenizer",
        "synced_gpus",
        "custom_generate",
        "logits_to_keep",
        "trust_remote_code",
        "assistant_model",
        "assistant_tokenizer",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
    }
)


_ORDINARY_CACHES = (None, "dynamic", "hybrid")
"""What stands for transformers' usual cache; older configs of windowed models say "hybrid", which it ignores."""

_WHOLE_PROMPT = "its drafts need what the model computes for the whole prompt"
_FROM_THE_HUB = "transformers runs code from the hub for it"
_READING_ASSISTANTS = ("Gemma4Assistant", "Gemma4UnifiedAssistant")
_MODES = {
    "penalty_alpha": f"contrastive search: {_FROM_THE_HUB}",
    "dola_layers": f"layers are contrasted: {_FROM_THE_HUB}",
    "force_words_ids": f"constrained beams: {_FROM_THE_HUB}",
    "constraints": f"constrained beams: {_FROM_THE_HUB}",
    "assistant_early_exit": "drafts come from the model's own first layers, which need a cache with fewer layers",
    "use_mtp": _WHOLE_PROMPT,
    "speculation_type": _WHOLE_PROMPT,
}
"""Ways of generating that pass through whenever they are set at all, and why."""
_SWITCHES = {
    "token_healing": "it changes the end of the prompt",
    "output_attentions": "those of every prompt token are asked for, so every one has to be computed",
    "output_hidden_states": "those of every prompt token are asked for, so every one has to be computed",
}
"""Options that pass through when they are on, and why."""


def generation_value(model: Any, generation_config: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return the value transformers will use for a generation parameter: argument, then config, then model."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    if generation_config is not None and getattr(generation_config, name, None) is not None:
        return getattr(generation_config, name)
    return getattr(getattr(model, "generation_config", None), name, None)


def input_ids_of(inputs: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the prompt's ids, wherever the caller put them."""
    return inputs if inputs is not None else kwargs.get("input_ids")


def copies_of_prompt(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> int:
    """Return how many sequences transformers makes of one prompt: beams, or several samples."""
    counts = [generation_value(model, generation_config, kwargs, n) for n in ("num_beams", "num_return_sequences")]
    return max(int(count or 1) for count in counts)


def is_assisted(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> bool:
    """True when drafts are verified several tokens at a time: by an assistant, or looked up in the prompt."""
    drafts = generation_value(model, generation_config, kwargs, "prompt_lookup_num_tokens")
    return kwargs.get("assistant_model") is not None or drafts is not None


def is_draft(generation_config: Any) -> bool:
    """True for the calls that transformers makes of an assistant: each drafts the next few tokens."""
    return bool(getattr(generation_config, "is_assistant", False))


def bypass_reason(
    model: Any, inputs: Any, generation_config: Any, kwargs: dict[str, Any], *, batches: str | None = None
) -> str | None:
    """Return why a ``generate()`` call cannot be served from blocks, or None when it can.

    Args:
        model: The wrapped model.
        inputs: First argument of ``generate()``.
        generation_config: Second one.
        kwargs: All others.
        batches: Which batches can be served: ``"padded"`` (on the left), ``"equal"`` (in length only), or none.
    """
    reason = _input_reason(model, inputs, generation_config, kwargs, batches)
    return reason or _mode_reason(model, generation_config, kwargs)


def _input_reason(
    model: Any, inputs: Any, generation_config: Any, kwargs: dict[str, Any], batches: str | None
) -> str | None:
    import torch

    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder model: the prompt is in the encoder"
    if kwargs.get("inputs_embeds") is not None:
        return "inputs_embeds: there are no token ids to compare"
    for name in ("past_key_values", "cache_params"):
        if kwargs.get(name) is not None:
            return f"{name}: the caller brings a cache of their own"
    ids = input_ids_of(inputs, kwargs)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return "no two-dimensional input_ids"
    if ids.shape[1] == 0 or ids.shape[0] == 0:
        return "empty prompt"
    mask = kwargs.get("attention_mask")
    if ids.shape[0] > 1:
        reason = _batch_reason(model, generation_config, kwargs, ids, mask, batches)
        if reason is not None:
            return reason
    elif mask is not None and (mask.shape != ids.shape or not bool((mask == 1).all())):
        return "attention_mask hides tokens or has another shape than input_ids"
    if mask is None and _has_padding(model, generation_config, kwargs, ids):
        return "the prompt contains the padding token and no attention_mask says what it means"
    if has_media(kwargs):
        reason = _media_reason(model, generation_config, kwargs, ids)
        if reason is not None:
            return reason
    known = _KNOWN_ARGUMENTS
    config = model.generation_config
    for name, value in kwargs.items():
        if value is None or name in known or name in MEDIA_ARGUMENTS or hasattr(config, name):
            continue
        if name in TYPE_ARGUMENTS and (
            has_media(kwargs) or (isinstance(value, torch.Tensor) and not bool(value.any()))
        ):
            continue
        if name == "position_ids" and not has_media(kwargs) and _are_usual(value, ids, mask):
            continue
        return f"argument {name!r}"
    return None


def _are_usual(positions: torch.Tensor, ids: torch.Tensor, mask: Any) -> bool:
    """True for the positions that tokens without padding have anyway (assistants are given them)."""
    import torch

    usual = torch.arange(ids.shape[1], device=positions.device)
    padded = mask is not None and not bool((mask == 1).all())
    return not padded and positions.shape == ids.shape and bool((positions == usual).all())


def _batch_reason(
    model: Any, generation_config: Any, kwargs: dict[str, Any], ids: torch.Tensor, mask: Any, batches: str | None
) -> str | None:
    from kvembed._batch import is_left_padded

    what = f"batch of {ids.shape[0]} prompts"
    if batches is None:
        return f"{what}, and some layer keeps a state that nothing is known of but its name"
    if ids.shape[1] < 2:
        return f"{what} of one token"
    if mask is not None and not (mask.shape == ids.shape and bool((mask == 1).all())):
        if mask.shape != ids.shape or not is_left_padded(mask):
            return (
                f"{what} not padded on the left: after padding, or over holes, a text goes on at other positions than "
                'in a call of its own (tokenizer.padding_side = "left")'
            )
        if batches != "padded":
            return f"{what} with padding, which gets into windows and states; only rows of equal length are reused"
    if is_assisted(model, generation_config, kwargs):
        return f"{what} with an assistant"
    scale = generation_value(model, generation_config, kwargs, "guidance_scale")
    if scale not in (None, 1, 1.0):
        return f"{what} with guidance_scale={scale}"
    return None


def _media_reason(model: Any, generation_config: Any, kwargs: dict[str, Any], ids: torch.Tensor) -> str | None:
    if ids.shape[0] > 1:
        return f"batch of {ids.shape[0]} prompts with media"
    if copies_of_prompt(model, generation_config, kwargs) > 1:
        return "media with beams or several sequences"
    if is_assisted(model, generation_config, kwargs):
        return "media with an assistant"
    if is_compiled(model):
        return "media with a compiled model"
    if kwargs.get("negative_prompt_ids") is not None or generation_value(
        model, generation_config, kwargs, "guidance_scale"
    ) not in (None, 1, 1.0):
        return "media with guidance_scale"
    if generation_value(model, generation_config, kwargs, "prefill_chunk_size"):
        return "media with prefill_chunk_size"
    return None


def _has_padding(model: Any, generation_config: Any, kwargs: dict[str, Any], ids: torch.Tensor) -> bool:
    """True when transformers would mask padding tokens by itself: pad occurs and differs from eos."""
    pad = generation_value(model, generation_config, kwargs, "pad_token_id")
    eos = generation_value(model, generation_config, kwargs, "eos_token_id")
    eos_ids = eos if isinstance(eos, list | tuple) else [eos]
    return pad is not None and pad not in eos_ids and bool((ids == pad).any())


def _mode_reason(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> str | None:
    def value(name: str) -> Any:
        return generation_value(model, generation_config, kwargs, name)

    if value("use_cache") is False:
        return "use_cache=False"
    if value("cache_implementation") not in _ORDINARY_CACHES:
        return f"cache_implementation={value('cache_implementation')!r}: a cache of another kind is asked for"
    if value("num_beam_groups") not in (None, 1):
        return f"num_beam_groups={value('num_beam_groups')}: {_FROM_THE_HUB}"
    if value("prefill_chunk_size") and not hf.CHUNKS_RESUME:
        return "prefill_chunk_size: this version of transformers feeds the whole prompt again to a filled cache"
    if kwargs.get("custom_generate") is not None:
        return "custom_generate: a loop of the caller's own, which may use its cache in any way"
    for name, why in _MODES.items():
        if value(name) is not None:
            return f"{name}: {why}"
    for name, why in _SWITCHES.items():
        if value(name):
            return f"{name}: {why}"
    if type(kwargs.get("assistant_model")).__name__.startswith(_READING_ASSISTANTS):
        return f"assistant_model: {_WHOLE_PROMPT}"
    if kwargs.get("synced_gpus"):
        return "synced_gpus: all processes have to run the same number of forwards, whatever each has cached"
    return None
