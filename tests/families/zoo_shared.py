"""What the rows of `zoo_configs` are written with: shared tiny sizes, and shorthands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["SHARED", "Row", "Sub", "mix", "rope", "row"]


@dataclass(frozen=True)
class Sub:
    """A nested configuration, sized by `SHARED` too.

    Attributes:
        model_type: transformers' name of the nested configuration.
        options: What differs from `SHARED`.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        name: The family's name in the zoo.
        model_type: transformers' name of the configuration.
        options: What differs from `SHARED`.
        architecture: The model's class, for those that `AutoModelForCausalLM` does not build.
        note: Anything a reader should know.
    """

    name: str
    model_type: str
    options: dict[str, Any]
    architecture: str = ""
    note: str = ""


SHARED: dict[str, Any] = {
    "vocab_size": 272,
    "bos_token_id": 257,
    "eos_token_id": None,  # generation runs to max_new_tokens
    "forced_eos_token_id": None,
    "pad_token_id": 256,
    # With random weights, tied embeddings make a model repeat its last token for ever.
    "tie_word_embeddings": False,
    # Larger than the usual 0.02, so that random weights make peaked logits.
    "initializer_range": 0.2,
    "init_std": 0.2,
    # Sizes, in each dialect.
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "n_positions": 1024,
    # Windows.
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
    # Latent attention and indexers.
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 512,  # above what tests feed: beyond it, blocks differ from one shot in transformers itself
    "index_head_dim": 16,
    "index_n_heads": 4,
    # Linear attention and state spaces.
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "use_mamba_kernels": False,
}
"""What every configuration gets, as far as it knows the name; `zoo` makes three exceptions."""

_KINDS = {
    "c": "chunked_attention",
    "f": "full_attention",
    "h": "hybrid",
    "i": "indexed_attention",
    "l": "linear_attention",
    "s": "sliding_attention",
    "v": "conv",
    "w": "hybrid_sliding",
}


def mix(pattern: str) -> dict[str, Any]:
    """Spells out layers.

    Args:
        pattern: A letter of `_KINDS` a layer: "sf" is a sliding and a full one.

    Returns:
        num_hidden_layers and layer_types.
    """
    return {"num_hidden_layers": len(pattern), "layer_types": [_KINDS[letter] for letter in pattern]}


def rope(rope_type: str, original: int = 32, **parameters: Any) -> dict[str, Any]:
    """Describes scaled rotations.

    Args:
        rope_type: transformers' name of the scaling.
        original: The length it scales from; the default is short, so that a prompt of 60 tokens is beyond it.
        parameters: More of rope_parameters.

    Returns:
        rope_parameters and max_position_embeddings.
    """
    given: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **parameters}
    if rope_type == "dynamic":  # scales from max_position_embeddings itself
        return {"rope_parameters": given, "max_position_embeddings": original}
    if rope_type != "linear":
        given["original_max_position_embeddings"] = original
    return {"rope_parameters": given, "max_position_embeddings": 4 * original}


def row(name: str, base: str = "", *, model: str = "", note: str = "", **options: Any) -> Row:
    """Makes a row.

    Args:
        name: The family's name in the zoo.
        base: transformers' name of the configuration, where it is another.
        model: The model's class, for those that `AutoModelForCausalLM` does not build.
        note: Anything a reader should know.
        options: What differs from `SHARED`.

    Returns:
        The row.
    """
    return Row(name, base or name, options, model, note)
