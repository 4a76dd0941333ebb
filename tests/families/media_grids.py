"""Families that cut pictures or videos into patches in one long tensor with a grid, and families that hear."""

from __future__ import annotations

from functools import partial

from .media_family import LLAMA, MM, MROPE, MROPE_HALF, QWEN_VISION, MediaFamily, qwen
from .media_items import AUDIO, by_grid, sound, video
from .zoo_shared import Sub, mix, row

__all__ = ["families"]


def families() -> list[MediaFamily]:
    """Return the families."""
    qwen25 = qwen(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        Sub("qwen2_5_vl_text", MROPE),
        Sub("qwen2_5_vl_vision", QWEN_VISION),
    )
    qwen3_vision = {**QWEN_VISION, "num_position_embeddings": 16}
    qwen3 = qwen(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        Sub("qwen3_vl_text"),
        Sub("qwen3_vl_vision", {**qwen3_vision, "deepstack_visual_indexes": [0]}),
    )
    omni = row(
        "qwen2_5_omni_thinker",
        model="Qwen2_5OmniThinkerForConditionalGeneration",
        text_config=Sub("qwen2_5_omni_text", MROPE),
        vision_config=Sub("qwen2_5_omni_vision_encoder", {**QWEN_VISION, "fullatt_block_indexes": [0]}),
        audio_config=Sub(
            "qwen2_5_omni_audio_encoder",
            {"num_mel_bins": 8, "output_dim": 64, "n_window": 10, "max_source_positions": 64},
        ),
    )
    return [
        MediaFamily(
            "qwen2_vl",
            qwen(
                "qwen2_vl",
                "Qwen2VLForConditionalGeneration",
                Sub("qwen2_vl_text", MROPE),
                Sub("qwen2_vl_vision", {"depth": 1, "embed_dim": 32, "hidden_size": 64, "patch_size": 4}),
            ),
            by_grid,
            types=MM,
        ),
        MediaFamily("qwen2_5_vl", qwen25, by_grid, types=MM),
        MediaFamily("qwen2_5_vl-video", qwen25, partial(video, seconds="second_per_grid_ts"), types=MM),
        MediaFamily("qwen3_vl", qwen3, by_grid, types=MM),
        MediaFamily("qwen3_vl-video", qwen3, partial(video, stamps=True), types=MM),
        MediaFamily(
            "qwen3_vl_moe",
            qwen(
                "qwen3_vl_moe",
                "Qwen3VLMoeForConditionalGeneration",
                Sub("qwen3_vl_moe_text"),
                Sub("qwen3_vl_moe_vision", {**qwen3_vision, "deepstack_visual_indexes": [0]}),
            ),
            by_grid,
            types=MM,
        ),
        MediaFamily(
            "qwen3_5",
            qwen(
                "qwen3_5",
                "Qwen3_5ForConditionalGeneration",
                Sub("qwen3_5_text", mix("lf")),
                Sub("qwen3_5_vision", qwen3_vision),
            ),
            by_grid,
            types=MM,
        ),
        MediaFamily(
            "glm4v",
            qwen(
                "glm4v",
                "Glm4vForConditionalGeneration",
                Sub("glm4v_text", MROPE),
                Sub("glm4v_vision", {**QWEN_VISION, "image_size": 32}),
            ),
            by_grid,
            types=MM,
        ),
        MediaFamily(
            "glm4v_moe",
            qwen(
                "glm4v_moe",
                "Glm4vMoeForConditionalGeneration",
                Sub("glm4v_moe_text", MROPE_HALF),
                Sub("glm4v_moe_vision", {**QWEN_VISION, "image_size": 32}),
            ),
            by_grid,
            types=MM,
        ),
        MediaFamily(
            "glm_ocr",
            qwen(
                "glm_ocr",
                "GlmOcrForConditionalGeneration",
                Sub("glm_ocr_text", {**MROPE_HALF}),
                Sub("glm_ocr_vision", {**QWEN_VISION, "image_size": 32}),
            ),
            by_grid,
            types=MM,
        ),
        MediaFamily(
            "qwen3_5_moe",
            qwen(
                "qwen3_5_moe",
                "Qwen3_5MoeForConditionalGeneration",
                Sub("qwen3_5_moe_text", mix("lf")),
                Sub("qwen3_5_moe_vision", qwen3_vision),
            ),
            by_grid,
            types=MM,
        ),
        MediaFamily(
            "exaone4_5",
            qwen(
                "exaone4_5",
                "Exaone4_5_ForConditionalGeneration",
                Sub("exaone4", mix("sf")),
                Sub("exaone4_5_vision", {**QWEN_VISION, "fullatt_block_indexes": [0]}),
            ),
            by_grid,
        ),
        MediaFamily(
            "paddleocr_vl",
            qwen(
                "paddleocr_vl",
                "PaddleOCRVLForConditionalGeneration",
                Sub("paddleocr_vl_text", MROPE),
                Sub("paddleocr_vl_vision", {"image_size": 32, "patch_size": 4}),
            ),
            partial(by_grid, flat=False),
            types=MM,
        ),
        MediaFamily(
            "kimi_k25",
            qwen(
                "kimi_k25",
                "Kimi_K25ForConditionalGeneration",
                Sub("llama"),
                Sub("kimi_k25_vision", {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}),
                projection_hidden_size=64,
            ),
            partial(by_grid, flat=False),
        ),
        MediaFamily(
            "lfm3_vl",
            qwen(
                "lfm3_vl",
                "Lfm3VlForConditionalGeneration",
                Sub("lfm2", mix("vf")),
                Sub("lfm3_vl_vision", {"patch_size": 4, **mix("ff")}),
                projector_hidden_size=32,
            ),
            by_grid,
        ),
        MediaFamily(
            "muse_glimmer",
            row(
                "muse_glimmer",
                model="MuseGlimmerForConditionalGeneration",
                text_config=Sub("muse_glimmer_text", mix("sfsf")),
                vision_config=Sub("muse_glimmer_vision", {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}),
                out_hidden_size=256,
                projector_hidden_size=32,
            ),
            by_grid,
        ),
        MediaFamily(
            "video_llama_3",
            qwen(
                "video_llama_3",
                "VideoLlama3ForConditionalGeneration",
                Sub("qwen2"),
                Sub("video_llama_3_vision", {"patch_size": 4}),
            ),
            partial(by_grid, sizes=True),
        ),
        MediaFamily(
            "hunyuan_vl",
            row(
                "hunyuan_vl",
                model="HunYuanVLForConditionalGeneration",
                text_config=Sub("hunyuan_vl_text", MROPE),
                vision_config=Sub("hunyuan_vl_vision", {"patch_size": 4, "out_hidden_size": 64, "max_image_size": 32}),
            ),
            partial(by_grid, newlines=True),
            types=MM,
        ),
        MediaFamily("qwen2_5_omni_thinker", omni, by_grid),
        MediaFamily(
            "qwen2_5_omni_thinker-audio",
            omni,
            partial(sound, bins=8, frames=40, tokens=10, mask="feature_attention_mask"),
        ),
        MediaFamily(
            "qwen2_audio",
            row(
                "qwen2_audio",
                model="Qwen2AudioForConditionalGeneration",
                text_config=Sub("qwen2"),
                audio_config=Sub("qwen2_audio_encoder", {"num_mel_bins": 8, "max_source_positions": 20}),
            ),
            partial(sound, bins=8, frames=40, tokens=10, mask="feature_attention_mask"),
        ),
        MediaFamily(
            "voxtral",
            row(
                "voxtral",
                model="VoxtralForConditionalGeneration",
                text_config=LLAMA,
                audio_config=Sub(
                    "voxtral_encoder", {"num_mel_bins": 8, "max_source_positions": 32, "intermediate_size": 256}
                ),
                audio_token_id=AUDIO,
            ),
            partial(sound, bins=8, frames=64, tokens=8),
        ),
        MediaFamily(
            "audioflamingo3",
            row(
                "audioflamingo3",
                model="AudioFlamingo3ForConditionalGeneration",
                text_config=Sub("qwen2"),
                audio_config=Sub("audioflamingo3_encoder", {"num_mel_bins": 8, "max_source_positions": 20}),
            ),
            partial(sound, bins=8, frames=40, tokens=10, mask="input_features_mask"),
        ),
        MediaFamily(
            "glmasr",
            row(
                "glmasr",
                model="GlmAsrForConditionalGeneration",
                text_config=LLAMA,
                audio_config=Sub(
                    "glmasr_encoder", {"num_mel_bins": 8, "max_position_embeddings": 64, "intermediate_size": 256}
                ),
            ),
            partial(sound, bins=8, frames=64, tokens=8, mask="input_features_mask"),
        ),
        MediaFamily(
            "granite_speech",
            row(
                "granite_speech",
                model="GraniteSpeechForConditionalGeneration",
                text_config=Sub("granite"),
                encoder_config=Sub(
                    "granite_speech_encoder",
                    {"input_dim": 16, "hidden_dim": 32, "num_heads": 4, "context_size": 15, "max_pos_emb": 16},
                ),
                projector_config=Sub("blip_2_qformer", {"encoder_hidden_size": 32}),
                has_lora_adapter=False,
            ),
            partial(sound, bins=16, frames=60, tokens=12, last=True),
        ),
    ]
