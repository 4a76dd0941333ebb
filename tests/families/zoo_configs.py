"""The table behind `zoo`: what each family of models needs beyond the shared tiny sizes."""

from __future__ import annotations

from typing import Any

from .zoo_shared import Row, Sub, mix, rope, row
from .zoo_wrapped import WRAPPED

__all__ = ["ROWS"]

_SF = mix("sfsf")
_DECODER: dict[str, Any] = {"is_decoder": True}
_LONG: dict[str, Any] = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
_COMPRESSED = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
_WRONG_BLOCKS = "transformers continues wrongly when fed several tokens: the scan starts from zero"

_PLAIN = """
apertus arcee aria_text axk1 bart bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom cohere
deepseek_v2 deepseek_v3 diffllama doge ernie4_5 ernie4_5_moe flex_olmo gemma glm glm4 glm4_moe glm4_moe_lite
gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese granite granitemoe granitemoeshared helium hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe llama marian mbart minicpm3 minimax_m2 mpt mvp
nanochat nemotron olmo olmo2 olmoe opt pegasus persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3
qwen3_moe seed_oss solar_open stablelm trocr xglm youtu
"""
"""Families that need nothing beyond the shared sizes: full attention, or none that is cached otherwise."""

_ENCODERS = "bert bert-generation electra ernie megatron-bert roformer"
"""Encoders, which is_decoder=True makes causal."""

_ROBERTAS = "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl"
"""Likewise, but they count positions from pad_token_id + 1, unless given position_ids, as generate() does."""

_SLIDING = """
afmoe beam cohere2 cohere2_moe cwm exaone4 exaone_moe flint gemma2 gemma3_text gpt_oss granite_swa granitemoe_swa
kolibri1 laguna mellum mimo_v2_flash ministral olmo3 vaultgemma
"""
"""Families that mix sliding and full layers, and need no more than to be told which."""

_LINEAR = "bailing_hybrid granitemoehybrid kimi_linear olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next"
"""Families that mix linear and full layers, likewise."""

_FULL: list[Row] = [
    *(row(name) for name in _PLAIN.split()),
    *(row(name, **_DECODER) for name in _ENCODERS.split()),
    *(row(name, **_DECODER, note="positions start at 257 without position_ids") for name in _ROBERTAS.split()),
    row("big_bird", **_DECODER, attention_type="original_full"),
    row("codegen", rotary_dim=8),
    row(
        "cpmant",
        dim_head=16,
        dim_ff=96,
        prompt_types=4,
        prompt_length=4,
        segment_types=4,
        position_bias_num_buckets=32,
        note="wants every id at each call; puts 4 prompt tokens of its own before them",
    ),
    row("ctrl", dff=96),
    row(
        "dbrx",
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    row("dots1", layer_types=["full_attention"] * 2),
    row("emu3_text_model", model="Emu3ForCausalLM"),
    row("falcon", num_kv_heads=2, new_decoder_architecture=True),
    row("falcon-alibi", "falcon", alibi=True, multi_query=False),
    row("fuyu", text_config=Sub("persimmon"), patch_size=4, image_token_id=270),
    row(
        "git",
        vision_config=Sub(
            "git_vision_model",
            {"hidden_size": 32, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        ),
    ),
    row(
        "gpt_neo", attention_types=[[["global", "local"], 1]], window_size=24, note="its local layers mask a full cache"
    ),
    row("gptj", rotary_dim=8),
    row("hrm_text", note="feeds its layers several times a token, each time with a cache layer of its own"),
    row("lfm2-full", "lfm2"),
    row("longcat_flash", ffn_hidden_size=96, expert_ffn_hidden_size=32, zero_expert_num=2, head_dim=8),
    row("mistral4", model="Mistral4ForCausalLM"),
    row("mllama_text_model", model="MllamaForCausalLM", num_hidden_layers=3, cross_attention_layers=[1]),
    row("openai-gpt", note="no cache"),
    row("rembert", **_DECODER, input_embedding_size=32, output_embedding_size=32),
    row(
        "roc_bert",
        **_DECODER,
        enable_pronunciation=False,
        enable_shape=False,
        concat_input=False,
        pronunciation_vocab_size=272,
        shape_vocab_size=272,
        pronunciation_embed_dim=8,
        shape_embed_dim=8,
    ),
    row("smollm3", **mix("ff"), no_rope_layers=[1, 0]),
    row("whisper", max_target_positions=1024, max_source_positions=32, num_mel_bins=8),
    row("xmod", **_DECODER, default_language="en_XX", note="positions start at 257 without position_ids"),
    row("xlm", emb_dim=64, causal=True, use_lang_emb=False, note="no cache"),
    row(
        "prophetnet",
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        max_position_embeddings=512,
        note="generate() fails in transformers itself",
    ),
    # Scaled rotations.
    row("llama-linear", "llama", **rope("linear")),
    row("llama-yarn", "llama", **rope("yarn")),
    row("llama-llama3", "llama", **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    row("llama-dynamic", "llama", **rope("dynamic"), note="inv_freq grows with the longest text seen"),
    row("llama-longrope", "llama", **rope("longrope", **_LONG), note="inv_freq changes beyond 32 tokens"),
    row("llama-longrope-short", "llama", **rope("longrope", 2048, **_LONG)),
    row(
        "phi3-longrope",
        "phi3",
        **rope("longrope", **_LONG),
        original_max_position_embeddings=32,
        note="drops a passed cache beyond 32 tokens",
    ),
    row("phi3-longrope-short", "phi3", **rope("longrope", 2048, **_LONG), original_max_position_embeddings=2048),
]

_WINDOWS: list[Row] = [
    *(row(name, **_SF) for name in _SLIDING.split()),
    row(
        "cohere_compass_text",
        **_SF,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    ),
    row("dots1-sliding", "dots1", **_SF),
    row("gemma3n_text", **_SF, num_kv_shared_layers=2, vocab_size_per_layer_input=272, hidden_size_per_layer_input=8),
    row("gemma4_text", **_SF, vocab_size_per_layer_input=272, hidden_size_per_layer_input=8, global_head_dim=32),
    row(
        "gemma4_text-shared",
        "gemma4_text",
        **_SF,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=272,
        hidden_size_per_layer_input=8,
        global_head_dim=32,
    ),
    row("gemma4_unified_text", **_SF, global_head_dim=32),
    row("llama4_text", **mix("cfcf"), attention_chunk_size=24, intermediate_size_mlp=96),
    row("ministral3", sliding_window=24),
    row("mistral"),
    row("mixtral", sliding_window=24),
    row("modernbert-decoder", **mix("fs"), local_attention=48),
    row(
        "moshi",
        ffn_dim=96,
        num_key_value_heads=2,
        audio_vocab_size=32,
        note="its mask is full, its cache slides: wrong beyond 24 tokens",
    ),
    row("phi3-sliding", "phi3", sliding_window=24),
    row("qwen2-sliding", "qwen2", **_SF, use_sliding_window=True),
    row("starcoder2", sliding_window=24),
]

_STATES: list[Row] = [
    *(row(name, **mix("lfl")) for name in _LINEAR.split()),
    row("bamba", attn_layer_indices=[1], num_hidden_layers=3, note="blocks need explicit position_ids"),
    row("falcon_h1"),
    row("falcon_mamba", note=_WRONG_BLOCKS),
    row(
        "inkling_text",
        **mix("wh"),
        rel_extent=64,
        d_rel=8,
        sliding_window_size=24,
        logits_mup_width_multiplier=1.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        mlp_layer_types=["dense", "sparse"],
    ),
    row(
        "inkling2_text",
        **mix("wh"),
        rel_extent=64,
        d_rel=8,
        sliding_window_size=24,
        unpadded_vocab_size=272,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
    ),
    row("jamba", attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, note=_WRONG_BLOCKS),
    row("lfm2", **mix("vfv")),
    row("lfm2_moe", **mix("vfv")),
    row("lfm3", **mix("vfsv")),
    row("mamba", note=_WRONG_BLOCKS),
    row("mamba2", num_heads=8, note="no attention, no length, cache_params"),
    row("minimax", **mix("lfl"), block_size=16, note="a cache class of its own"),
    row(
        "nemotron_h",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        moe_shared_expert_intermediate_size=32,
    ),
    row(
        "recurrent_gemma",
        num_hidden_layers=3,
        attention_window_size=24,
        w_init_variance_scale=1.0,
        note="its state lives on the module",
    ),
    row("rwkv", note="its cache is a list of tensors, named state"),
    row("xlnet", d_inner=96, note="its cache is a list of tensors, named mems"),
    row("xlstm", qk_dim_factor=1.0, note="a cache class of its own"),
    row("zamba", layers_block_type=mix("lhl")["layer_types"], num_hidden_layers=3, note=_WRONG_BLOCKS),
    row("zamba2", layers_block_type=mix("lhl")["layer_types"], num_hidden_layers=3),
    row("zaya", **mix("hw"), num_experts_per_tok=1, router_hidden_size=16, sliding_window=24),
    row(
        "reformer",
        **_DECODER,
        attn_layers=["local", "lsh"],
        axial_pos_embds=False,
        hash_seed=0,
        num_buckets=4,
        feed_forward_size=96,
        attention_head_size=16,
        local_attn_chunk_length=16,
        lsh_attn_chunk_length=16,
        max_position_embeddings=1024,
        note="a cache class of its own",
    ),
]

_SPARSE: list[Row] = [
    row("axk2"),
    row("deepseek_v32"),
    row("deepseek_v32-topk", "deepseek_v32", index_topk=16, note="longer texts: blocks differ from one shot"),
    row(
        "deepseek_v4",
        num_hidden_layers=3,
        layer_types=_COMPRESSED,
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        num_key_value_heads=1,
        head_dim=32,
        partial_rotary_factor=0.25,
        o_groups=2,
        o_lora_rank=16,
        hc_mult=2,
        note="cache layers of its own",
    ),
    row(
        "dots3_note_text",
        **mix("iis"),
        shared_experts_intermediate_size=32,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=24,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=16,
    ),
    row("glm_moe_dsa"),
    row("hy_v4"),
    row(
        "minimax_m3_vl_text",
        layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse"],
        index_n_heads=2,
        index_block_size=16,
        dense_intermediate_size=96,
        rotary_dim=8,
        note="a cache layer of its own",
    ),
    row(
        "qwen4_exp_text",
        **mix("lil"),
        ple_layer_ids=[1],
        ple_embed_dim=16,
        heads_per_ngram=2,
        ngram_vocab_size_base=64,
        split_ngram_parts=1,
        make_ngram_vocab_size_divisible_by=8,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=512,
        indexer_compress_ratio=4,
        eos_token_id=271,
        note="hashes n-grams of ids, which need an end token",
    ),
]

ROWS: list[Row] = [*_FULL, *_WINDOWS, *_STATES, *_SPARSE, *WRAPPED]
"""Every family: full attention, windows, states, sparse attention, and models around a text model."""
