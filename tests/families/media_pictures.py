"""Families that take pictures one by one: a row of pixels each, several tiles, a mask, sizes or rows with breaks."""

from __future__ import annotations

from functools import partial

import torch

from .media_family import CLIP, LLAMA, MM, SIGLIP, TWO_LAYERS, MediaFamily
from .media_items import IMAGE, anyres, frames, gemma4, joined_tiles, naflex, padded, picture, rows, sound, tiles
from .zoo_shared import Sub, mix, row

__all__ = ["families"]


def families() -> list[MediaFamily]:
    """Return the families."""
    gemma4_row = row(
        "gemma4",
        model="Gemma4ForConditionalGeneration",
        text_config=Sub("gemma4_text", {**mix("sfsf"), "vocab_size_per_layer_input": 272}),
        vision_config=Sub("gemma4_vision", {"pooling_kernel_size": 2, "patch_size": 4, "position_embedding_size": 32}),
        audio_config=Sub("gemma4_audio", {"subsampling_conv_channels": [128, 8], "output_proj_dims": 64}),
    )
    onevision = row(
        "llava_onevision",
        model="LlavaOnevisionForConditionalGeneration",
        text_config=LLAMA,
        vision_config=SIGLIP,
        image_grid_pinpoints=[[28, 28], [28, 56]],
    )
    return [
        MediaFamily(
            "gemma3",
            row(
                "gemma3",
                model="Gemma3ForConditionalGeneration",
                text_config=Sub("gemma3_text", mix("sfsf")),
                vision_config=Sub("siglip_vision_model", {"image_size": 56, "patch_size": 14}),
                mm_tokens_per_image=4,
            ),
            partial(picture, size=56, tokens=4),
            types={"token_type_ids": {IMAGE: 1}},
        ),
        MediaFamily("gemma4", gemma4_row, gemma4, types=MM),
        MediaFamily(
            "smolvlm",
            row(
                "smolvlm",
                model="SmolVLMForConditionalGeneration",
                text_config=LLAMA,
                vision_config=Sub("smolvlm_vision", {"image_size": 32, "patch_size": 8}),
            ),
            partial(padded, size=32, tokens=4),
            dim=1,
        ),
        MediaFamily(
            "idefics3",
            row(
                "idefics3",
                model="Idefics3ForConditionalGeneration",
                text_config=LLAMA,
                vision_config=Sub("idefics3_vision", {"image_size": 32, "patch_size": 8}),
            ),
            partial(padded, size=32, tokens=4),
            dim=1,
        ),
        MediaFamily(
            "idefics2",
            row(
                "idefics2",
                model="Idefics2ForConditionalGeneration",
                text_config=Sub("mistral"),
                vision_config=Sub("idefics2_vision", {"image_size": 32, "patch_size": 8}),
                perceiver_config=Sub(
                    "idefics2_perceiver",
                    {"resampler_n_latents": 6, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 16},
                ),
            ),
            partial(padded, size=32, tokens=6),
            dim=1,
        ),
        MediaFamily(
            "llava",
            row("llava", model="LlavaForConditionalGeneration", text_config=LLAMA, vision_config=CLIP),
            partial(picture, size=28, tokens=4),
        ),
        MediaFamily(
            "vipllava",
            row(
                "vipllava",
                model="VipLlavaForConditionalGeneration",
                text_config=LLAMA,
                vision_config=CLIP,
                **TWO_LAYERS,
            ),
            partial(picture, size=28, tokens=4),
        ),
        MediaFamily(
            "llava_next",
            row(
                "llava_next",
                model="LlavaNextForConditionalGeneration",
                text_config=LLAMA,
                vision_config=CLIP,
                image_grid_pinpoints=[[28, 28], [28, 56]],
            ),
            partial(anyres, side=28, patch=14, extra=0),
        ),
        MediaFamily("llava_onevision", onevision, partial(anyres, side=28, patch=14, extra=0)),
        MediaFamily(
            "llava_onevision-multi",
            onevision,
            partial(anyres, side=28, patch=14, extra=0, single=True),
            whole=lambda n: {"batch_num_images": torch.tensor([n])},
        ),
        MediaFamily(
            "internvl",
            row(
                "internvl",
                model="InternVLForConditionalGeneration",
                text_config=LLAMA,
                vision_config=Sub("internvl_vision", {"image_size": [32, 32], "patch_size": [8, 8]}),
            ),
            partial(joined_tiles, size=32, tokens=4),
        ),
        MediaFamily(
            "mistral3",
            row(
                "mistral3",
                model="Mistral3ForConditionalGeneration",
                text_config=Sub("mistral"),
                vision_config=Sub("pixtral", {"patch_size": 8, "image_size": 64}),
            ),
            rows,
        ),
        MediaFamily(
            "llava-pixtral",
            row(
                "llava",
                model="LlavaForConditionalGeneration",
                text_config=Sub("mistral"),
                vision_config=Sub("pixtral", {"patch_size": 16, "image_size": 64}),
                vision_feature_select_strategy="full",
                vision_feature_layer=-1,
            ),
            rows,
        ),
        MediaFamily(
            "lighton_ocr",
            row(
                "lighton_ocr",
                model="LightOnOcrForConditionalGeneration",
                text_config=Sub("qwen3"),
                vision_config=Sub("pixtral", {"patch_size": 8, "image_size": 64}),
            ),
            rows,
        ),
        MediaFamily(
            "aya_vision",
            row(
                "aya_vision",
                model="AyaVisionForConditionalGeneration",
                text_config=Sub("cohere2", mix("sf")),
                vision_config=Sub("siglip_vision_model", {"image_size": 56, "patch_size": 14}),
            ),
            partial(tiles, size=56, tokens=4),
        ),
        MediaFamily(
            "cohere2_vision",
            row(
                "cohere2_vision",
                model="Cohere2VisionForConditionalGeneration",
                text_config=Sub("cohere2", mix("sf")),
                vision_config=Sub("siglip_vision_model", {"image_size": 56, "patch_size": 14}),
                alignment_intermediate_size=64,
            ),
            partial(tiles, size=56, tokens=4),
        ),
        MediaFamily(
            "lfm2_vl",
            row(
                "lfm2_vl",
                model="Lfm2VlForConditionalGeneration",
                text_config=Sub("lfm2", mix("vf")),
                vision_config=Sub("siglip2_vision_model", {"patch_size": 8, "num_patches": 16}),
                projector_hidden_size=32,
            ),
            naflex,
        ),
        MediaFamily(
            "deepseek_vl",
            row(
                "deepseek_vl",
                model="DeepseekVLForConditionalGeneration",
                text_config=LLAMA,
                vision_config=SIGLIP,
            ),
            partial(picture, size=28, tokens=4),
        ),
        MediaFamily(
            "qianfan_ocr",
            row(
                "qianfan_ocr",
                model="QianfanOCRForConditionalGeneration",
                text_config=Sub("qwen3"),
                vision_config=Sub("qianfan_ocr_vision", {"image_size": [32, 32], "patch_size": [8, 8]}),
            ),
            partial(joined_tiles, size=32, tokens=4),
        ),
        MediaFamily(
            "ovis2",
            row(
                "ovis2",
                model="Ovis2ForConditionalGeneration",
                text_config=Sub("qwen2"),
                vision_config=Sub("ovis2_vision", {"image_size": 28, "patch_size": 7, "vocab_size": 64}),
                visual_indicator_token_ids=[266, 267, 268, 269, 270],
                hidden_size=64,
            ),
            partial(picture, size=28, tokens=16),
        ),
        MediaFamily(
            "aria",
            row(
                "aria",
                model="AriaForConditionalGeneration",
                text_config=Sub("aria_text"),
                vision_config=Sub("idefics3_vision", {"image_size": 32, "patch_size": 8}),
                projector_patch_to_query_dict={16: 4},
            ),
            partial(picture, size=32, tokens=4),
        ),
        MediaFamily(
            "mistral_large4",
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
                vision_config=Sub("pixtral", {"patch_size": 8, "image_size": 64}),
            ),
            rows,
        ),
        MediaFamily(
            "paligemma",
            row(
                "paligemma",
                model="PaliGemmaForConditionalGeneration",
                text_config=Sub("gemma"),
                vision_config=SIGLIP,
                projection_dim=64,
                hidden_size=64,
            ),
            partial(picture, size=28, tokens=4),
            types={"token_type_ids": {}},
            refused="other logits than one forward",
        ),
        MediaFamily(
            "llama4",
            row(
                "llama4",
                model="Llama4ForConditionalGeneration",
                text_config=Sub("llama4_text", {**mix("cf"), "attention_chunk_size": 24, "intermediate_size_mlp": 96}),
                vision_config=Sub(
                    "llama4_vision_model",
                    {
                        "image_size": 56,
                        "patch_size": 14,
                        "vision_output_dim": 64,
                        "projector_input_dim": 64,
                        "projector_output_dim": 64,
                        "intermediate_size": 256,
                    },
                ),
            ),
            partial(tiles, size=56, tokens=4),
        ),
        MediaFamily(
            "gemma4-audio",
            gemma4_row,
            partial(sound, bins=128, frames=32, tokens=8, mask="input_features_mask", last=True, kind=bool),
            types=MM,
        ),
        MediaFamily("llava_onevision-video", onevision, partial(frames, size=28, tokens=5)),
    ]
