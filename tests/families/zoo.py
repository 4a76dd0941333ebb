"""Tiny random models of every causal family of transformers, to try the cache on.

`FAMILIES` names those the installed version has; `build` makes one. Each takes a few milliseconds and holds well under
a million weights. Their vocabulary is `zoo_shared.SHARED`'s: ids 0-249 are text, 256 pads, 257 begins, nothing ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .zoo_configs import ROWS
from .zoo_shared import SHARED, Row, Sub

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "Family", "build", "configuration", "is_known"]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: transformers' model_type, or that and a variant, such as "llama-yarn".
        config: Makes the tiny configuration; imports transformers only when called.
        note: Anything a reader should know.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    note: str = ""


def _tiny(model_type: str, options: dict[str, Any]) -> PreTrainedConfig:
    """Makes a configuration from `SHARED` (the names it knows) and `options` (which it must know).

    Args:
        model_type: transformers' name of the configuration.
        options: What differs from `SHARED`; `Sub` stands for a nested configuration.

    Returns:
        The configuration.

    Raises:
        TypeError: The configuration has no such option.
    """
    from transformers import CONFIG_MAPPING

    cls: Any = CONFIG_MAPPING[model_type]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    aliases = {alias for alias, name in cls.attribute_map.items() if name in fields}
    if unknown := options.keys() - fields.keys() - aliases - _UNDECLARED:
        raise TypeError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    given = {cls.attribute_map.get(name, name): value for name, value in options.items()}
    shared = {name: value for name, value in SHARED.items() if name in fields}
    if "sliding_window" in fields and fields["sliding_window"].default is None:
        del shared["sliding_window"]  # it would turn full layers into sliding ones
    if "rope_parameters" not in fields and "max_position_embeddings" in fields:
        shared["max_position_embeddings"] = 1024  # a learned table, which costs weights
    if "kv_lora_rank" in fields:
        shared["num_key_value_heads"] = shared["num_attention_heads"]  # latent attention has no groups
    merged: dict[str, Any] = {}
    for name, value in {**shared, **given}.items():
        merged[name] = _tiny(value.model_type, value.options) if isinstance(value, Sub) else value
    return cls(**merged)


_UNDECLARED = frozenset(
    {"decoder_start_token_id", "global_head_dim", "num_hidden_layers"}
    | {"swa_head_dim", "swa_kv_lora_rank", "swa_num_attention_heads", "swa_num_key_value_heads"}
    | {"swa_q_lora_rank", "swa_qk_nope_head_dim", "swa_v_head_dim"}
)
"""Options that configurations take without declaring them as fields."""


def configuration(row: Row) -> PreTrainedConfig:
    config = _tiny(row.model_type, row.options)
    if row.architecture:
        config.architectures = [row.architecture]
    return config


def is_known(model_type: str, options: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    nested = [value for value in options.values() if isinstance(value, Sub)]
    return model_type in CONFIG_MAPPING and all(is_known(sub.model_type, sub.options) for sub in nested)


FAMILIES: dict[str, Family] = {
    row.name: Family(row.name, partial(configuration, row), row.note)
    for row in ROWS
    if is_known(row.model_type, row.options)  # older versions lack some
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Builds a family's tiny model, the same for equal arguments.

    Args:
        name: A key of `FAMILIES`.
        seed: Seeds the weights; the global generator stays as it was.

    Returns:
        The model in fp32 and evaluation mode, with sdpa where the family has it.
    """
    import torch
    import transformers

    config = FAMILIES[name].config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.architectures:
            model = getattr(transformers, config.architectures[0])(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # where the configuration needs one
    model.config.use_cache = model.generation_config.use_cache = True  # MPT leaves it off
    return model.eval()
