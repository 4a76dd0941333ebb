"""Rows for models around a text model: encoder-decoders, and those that also see or hear (used for text only)."""

from __future__ import annotations

from .zoo_shared import Row, Sub, mix, row

__all__ = ["WRAPPED"]

_SF = mix("sfsf")

WRAPPED: list[Row] = [
    row("bart-seq2seq", "bart", model="BartForConditionalGeneration", note="encoder-decoder"),
    row("t5", model="T5ForConditionalGeneration", d_kv=16, d_ff=96, decoder_start_token_id=257, note="encoder-decoder"),
    row(
        "gemma3",
        model="Gemma3ForConditionalGeneration",
        text_config=Sub("gemma3_text", _SF),
        vision_config=Sub("siglip_vision_model", {"image_size": 28, "patch_size": 14}),
    ),
    row(
        "glm5_next",
        model="Glm5NextForConditionalGeneration",
        text_config=Sub(
            "glm5_next_text",
            {
                **mix("lil"),
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "indexer_types": ["full"] * 3,
                "qk_rope_head_dim": 0,
                "index_kpool": 4,
            },
        ),
        vision_config=Sub("glm5_next_vision", {"depth": 1, "projection_intermediate_size": 32, "out_hidden_size": 64}),
    ),
    row(
        "llama4",
        model="Llama4ForConditionalGeneration",
        text_config=Sub("llama4_text", {**mix("cf"), "attention_chunk_size": 24, "intermediate_size_mlp": 96}),
        vision_config=Sub(
            "llama4_vision_model",
            {"image_size": 28, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        ),
    ),
    row(
        "mistral_large4",
        model="MistralLarge4ForConditionalGeneration",
        text_config=Sub(
            "mistral_large4_text",
            {
                "num_hidden_layers": 4,
                "kv_source_layers": [0, 0, 2, 2],
                "indexer_types": ["full", "shared", "full", "shared"],
                "no_rope_layers": [1, 1, 0, 0],
            },
        ),
        vision_config=Sub("pixtral", {"patch_size": 16, "image_size": 32}),
    ),
    row(
        "muse_glimmer",
        model="MuseGlimmerForConditionalGeneration",
        text_config=Sub("muse_glimmer_text", _SF),
        vision_config=Sub("muse_glimmer_vision", {"pos_emb_height": 4, "pos_emb_width": 4}),
        out_hidden_size=256,
        projector_hidden_size=32,
    ),
    row(
        "muse_spark",
        model="MuseSparkForConditionalGeneration",
        text_config=Sub("muse_spark_text", {**_SF, "moe_hidden_size": 32}),
        vision_config=Sub("muse_spark_vision", {"pos_emb_height": 4, "pos_emb_width": 4}),
        audio_config=Sub(
            "muse_spark_audio",
            {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "out_hidden_size": 64},
        ),
        out_hidden_size=256,
        projector_hidden_size=32,
    ),
    row(
        "phi4_multimodal",
        vision_config=Sub("phi4_multimodal_vision", {"image_size": 28, "crop_size": 28, "patch_size": 14}),
        audio_config=Sub(
            "phi4_multimodal_audio",
            {
                "num_blocks": 1,
                "ext_pw_out_channel": 64,
                "depthwise_separable_out_channel": 64,
                "nemo_conv_channels": 16,
                "input_size": 16,
            },
        ),
    ),
    row(
        "qwen2_5_vl",
        model="Qwen2_5_VLForConditionalGeneration",
        text_config=Sub(
            "qwen2_5_vl_text",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        ),
        vision_config=Sub("qwen2_5_vl_vision", {"depth": 1, "out_hidden_size": 64}),
        note="text only; rope_deltas stays on the model after an image",
    ),
    row(
        "qwen3_vl",
        model="Qwen3VLForConditionalGeneration",
        text_config=Sub("qwen3_vl_text"),
        vision_config=Sub(
            "qwen3_vl_vision",
            {"depth": 1, "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        ),
        note="text only; rope_deltas stays on the model after an image",
    ),
    row(
        "smolvlm",
        model="SmolVLMForConditionalGeneration",
        text_config=Sub("llama"),
        vision_config=Sub("smolvlm_vision", {"image_size": 32, "patch_size": 16}),
        image_token_id=270,
    ),
    row(
        "step3p7",
        model="Step3p7ForConditionalGeneration",
        text_config=Sub(
            "step3p5",
            {
                **_SF,
                "sliding_window": 24,
                "num_sliding_attention_heads": 4,
                "share_expert_dim": 32,
                "mlp_layer_types": ["dense", "sparse"] * 2,
            },
        ),
        vision_config=Sub("step3p5_vision", {"image_size": 28, "max_position_embeddings": 16}),
    ),
    row(
        "unlimited_ocr",
        model="UnlimitedOcrForConditionalGeneration",
        text_config=Sub(
            "unlimited_ocr_text",
            {"layer_types": ["reference_sliding_attention"] * 2, "mlp_layer_types": ["dense", "sparse"]},
        ),
        vision_config=Sub(
            "unlimited_ocr_vision",
            {
                "sam_config": Sub(
                    "unlimited_ocr_sam_vision_model",
                    {
                        "image_size": 32,
                        "mlp_dim": 32,
                        "output_channels": 16,
                        "downsample_channels": [16, 64],
                        "global_attn_indexes": [1],
                        "window_size": 2,
                    },
                ),
                "encoder_config": Sub("unlimited_ocr_vision_encoder", {"image_size": 32}),
            },
        ),
        note="a window that counts from what the first call to its cache fed",
    ),
    row(
        "blt",
        patcher_config=Sub("blt_patcher", {"num_key_value_heads": 4}),
        encoder_config=Sub("blt_local_encoder", {"hidden_size_global": 64, "num_key_value_heads": 4}),
        decoder_config=Sub("blt_local_decoder", {"hidden_size_global": 64, "num_key_value_heads": 4}),
        global_config=Sub("blt_global_transformer", {"num_key_value_heads": 4}),
        num_hidden_layers=2,
        encoder_hash_byte_group_size=[3, 4],
        encoder_hash_byte_group_vocab=256,
        note="patches bytes by entropy: transformers' own generation with a cache differs from that without",
    ),
]
