"""Tiny random models that see or hear, and what their processors make of text with pictures, video or sound.

`MEDIA` names the families the installed version has; `seeing` builds one, `prompt` makes inputs. Each stands for the
way its family brings media: patches of all pictures in one long tensor with a grid, one row a picture, several tiles
a picture, padded pictures with a mask or with sizes, rows of a picture with break tokens between them, frames of a
video with timestamps between them, sound with a mask. The second picture has another size than the first where that
is possible. Placeholders are ids of `zoo_shared.SHARED`'s vocabulary that no text has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from kvembed.hf._compat import is_before

from .media_items import (
    AUDIO,
    BREAK,
    IMAGE,
    TOKENS,
    VIDEO,
    Item,
    anyres,
    by_grid,
    frames,
    gemma4,
    joined_tiles,
    naflex,
    padded,
    picture,
    rows,
    sound,
    text,
    tiles,
    video,
)
from .zoo import configuration, is_known
from .zoo_shared import Row, Sub, mix, row

__all__ = ["AUDIO", "IMAGE", "MEDIA", "VIDEO", "Item", "MediaFamily", "arguments_of", "prompt", "seeing", "with_ids"]


@dataclass(frozen=True)
class MediaFamily:
    """A family, and how it brings one kind of media.

    Args:
        name: transformers' model type, and a variant.
        row: How the model is built.
        item: Makes one picture from the model's config, its number in the prompt and a seed.
        dim: The dimension along which several are put together.
        types: Arguments that mark media tokens, with the number each placeholder gets.
        whole: Arguments that depend on how many pictures there are, made from that number.
        refused: Why calls pass through (a part of the reason); empty where they are served.
    """

    name: str
    row: Row
    item: Callable[[Any, int, int], Item]
    dim: int = 0
    types: dict[str, dict[int, int]] = field(default_factory=dict)
    whole: Callable[[int], dict[str, torch.Tensor]] | None = None
    refused: str = ""


# ------------------------------------------------------------------------------------- families

_MROPE_HALF = {  # half of each head is rotated
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_SIGLIP = Sub("siglip_vision_model", {"image_size": 28, "patch_size": 14})
_CLIP = Sub("clip_vision_model", {"image_size": 28, "patch_size": 14, "projection_dim": 32})
_QWEN_VISION = {"depth": 1, "out_hidden_size": 64, "patch_size": 4}
_MM = {"mm_token_type_ids": {IMAGE: 1, VIDEO: 2, AUDIO: 3}}
_LLAMA = Sub("llama")
_TWO_LAYERS: dict[str, Any] = {"vision_feature_layers" if is_before((5, 23)) else "vision_feature_layer": [-1, -2]}


def _qwen(name: str, model: str, text: Sub, vision: Sub, **options: Any) -> Row:
    return row(name.split("-")[0], model=model, text_config=text, vision_config=vision, **options)


def _families() -> list[MediaFamily]:
    qwen25 = _qwen(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        Sub("qwen2_5_vl_text", _MROPE),
        Sub("qwen2_5_vl_vision", _QWEN_VISION),
    )
    qwen3_vision = {**_QWEN_VISION, "num_position_embeddings": 16}
    qwen3 = _qwen(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        Sub("qwen3_vl_text"),
        Sub("qwen3_vl_vision", {**qwen3_vision, "deepstack_visual_indexes": [0]}),
    )
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
        text_config=_LLAMA,
        vision_config=_SIGLIP,
        image_grid_pinpoints=[[28, 28], [28, 56]],
    )
    omni = row(
        "qwen2_5_omni_thinker",
        model="Qwen2_5OmniThinkerForConditionalGeneration",
        text_config=Sub("qwen2_5_omni_text", _MROPE),
        vision_config=Sub("qwen2_5_omni_vision_encoder", {**_QWEN_VISION, "fullatt_block_indexes": [0]}),
        audio_config=Sub(
            "qwen2_5_omni_audio_encoder",
            {"num_mel_bins": 8, "output_dim": 64, "n_window": 10, "max_source_positions": 64},
        ),
    )
    return [
        MediaFamily(
            "qwen2_vl",
            _qwen(
                "qwen2_vl",
                "Qwen2VLForConditionalGeneration",
                Sub("qwen2_vl_text", _MROPE),
                Sub("qwen2_vl_vision", {"depth": 1, "embed_dim": 32, "hidden_size": 64, "patch_size": 4}),
            ),
            by_grid,
            types=_MM,
        ),
        MediaFamily("qwen2_5_vl", qwen25, by_grid, types=_MM),
        MediaFamily("qwen2_5_vl-video", qwen25, partial(video, seconds="second_per_grid_ts"), types=_MM),
        MediaFamily("qwen3_vl", qwen3, by_grid, types=_MM),
        MediaFamily("qwen3_vl-video", qwen3, partial(video, stamps=True), types=_MM),
        MediaFamily(
            "qwen3_vl_moe",
            _qwen(
                "qwen3_vl_moe",
                "Qwen3VLMoeForConditionalGeneration",
                Sub("qwen3_vl_moe_text"),
                Sub("qwen3_vl_moe_vision", {**qwen3_vision, "deepstack_visual_indexes": [0]}),
            ),
            by_grid,
            types=_MM,
        ),
        MediaFamily(
            "qwen3_5",
            _qwen(
                "qwen3_5",
                "Qwen3_5ForConditionalGeneration",
                Sub("qwen3_5_text", mix("lf")),
                Sub("qwen3_5_vision", qwen3_vision),
            ),
            by_grid,
            types=_MM,
        ),
        MediaFamily(
            "glm4v",
            _qwen(
                "glm4v",
                "Glm4vForConditionalGeneration",
                Sub("glm4v_text", _MROPE),
                Sub("glm4v_vision", {**_QWEN_VISION, "image_size": 32}),
            ),
            by_grid,
            types=_MM,
        ),
        MediaFamily(
            "glm4v_moe",
            _qwen(
                "glm4v_moe",
                "Glm4vMoeForConditionalGeneration",
                Sub("glm4v_moe_text", _MROPE_HALF),
                Sub("glm4v_moe_vision", {**_QWEN_VISION, "image_size": 32}),
            ),
            by_grid,
            types=_MM,
        ),
        MediaFamily(
            "glm_ocr",
            _qwen(
                "glm_ocr",
                "GlmOcrForConditionalGeneration",
                Sub("glm_ocr_text", {**_MROPE_HALF}),
                Sub("glm_ocr_vision", {**_QWEN_VISION, "image_size": 32}),
            ),
            by_grid,
            types=_MM,
        ),
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
        MediaFamily("gemma4", gemma4_row, gemma4, types=_MM),
        MediaFamily(
            "gemma4-audio",
            gemma4_row,
            partial(sound, bins=128, frames=32, tokens=8, mask="input_features_mask", last=True, kind=bool),
            types=_MM,
        ),
        MediaFamily(
            "smolvlm",
            row(
                "smolvlm",
                model="SmolVLMForConditionalGeneration",
                text_config=_LLAMA,
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
                text_config=_LLAMA,
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
            row("llava", model="LlavaForConditionalGeneration", text_config=_LLAMA, vision_config=_CLIP),
            partial(picture, size=28, tokens=4),
        ),
        MediaFamily(
            "vipllava",
            row(
                "vipllava",
                model="VipLlavaForConditionalGeneration",
                text_config=_LLAMA,
                vision_config=_CLIP,
                **_TWO_LAYERS,
            ),
            partial(picture, size=28, tokens=4),
        ),
        MediaFamily(
            "llava_next",
            row(
                "llava_next",
                model="LlavaNextForConditionalGeneration",
                text_config=_LLAMA,
                vision_config=_CLIP,
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
        MediaFamily("llava_onevision-video", onevision, partial(frames, size=28, tokens=5)),
        MediaFamily(
            "internvl",
            row(
                "internvl",
                model="InternVLForConditionalGeneration",
                text_config=_LLAMA,
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
                text_config=_LLAMA,
                vision_config=_SIGLIP,
            ),
            partial(picture, size=28, tokens=4),
        ),
        MediaFamily(
            "qwen3_5_moe",
            _qwen(
                "qwen3_5_moe",
                "Qwen3_5MoeForConditionalGeneration",
                Sub("qwen3_5_moe_text", mix("lf")),
                Sub("qwen3_5_moe_vision", qwen3_vision),
            ),
            by_grid,
            types=_MM,
        ),
        MediaFamily(
            "exaone4_5",
            _qwen(
                "exaone4_5",
                "Exaone4_5_ForConditionalGeneration",
                Sub("exaone4", mix("sf")),
                Sub("exaone4_5_vision", {**_QWEN_VISION, "fullatt_block_indexes": [0]}),
            ),
            by_grid,
        ),
        MediaFamily(
            "paddleocr_vl",
            _qwen(
                "paddleocr_vl",
                "PaddleOCRVLForConditionalGeneration",
                Sub("paddleocr_vl_text", _MROPE),
                Sub("paddleocr_vl_vision", {"image_size": 32, "patch_size": 4}),
            ),
            partial(by_grid, flat=False),
            types=_MM,
        ),
        MediaFamily(
            "kimi_k25",
            _qwen(
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
            _qwen(
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
            _qwen(
                "video_llama_3",
                "VideoLlama3ForConditionalGeneration",
                Sub("qwen2"),
                Sub("video_llama_3_vision", {"patch_size": 4}),
            ),
            partial(by_grid, sizes=True),
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
            "hunyuan_vl",
            row(
                "hunyuan_vl",
                model="HunYuanVLForConditionalGeneration",
                text_config=Sub("hunyuan_vl_text", _MROPE),
                vision_config=Sub("hunyuan_vl_vision", {"patch_size": 4, "out_hidden_size": 64, "max_image_size": 32}),
            ),
            partial(by_grid, newlines=True),
            types=_MM,
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
                vision_config=_SIGLIP,
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
                text_config=_LLAMA,
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
                text_config=_LLAMA,
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


MEDIA: dict[str, MediaFamily] = {
    family.name: family for family in _families() if is_known(family.row.model_type, family.row.options)
}


def seeing(name: str, seed: int = 0) -> Any:
    """Builds a family's tiny model, the same for equal arguments, with placeholders in its vocabulary."""
    import transformers

    found = MEDIA[name].row
    config: Any = configuration(found)
    for token, number in TOKENS.items():
        # Qwen2.5-Omni's thinker has the last two in its checkpoints only.
        if getattr(config, token, None) is not None or token.startswith("vision_"):
            setattr(config, token, number)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, found.architecture)(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 and not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.2)  # Gemma 3's projection: no picture would be felt
    model.generation_config.eos_token_id = None
    # A reply with a placeholder in it could not be the start of another turn.
    model.generation_config.suppress_tokens = list(range(IMAGE, BREAK + 3))
    return model


def prompt(
    name: str, config: Any, pictures: list[int], *, before: int = 20, after: int = 12, between: int = 7
) -> dict[str, torch.Tensor]:
    """Returns what a processor makes of text with a picture for each of these seeds.

    Args:
        name: The family.
        config: Its model's.
        pictures: Seeds.
        before: Tokens of text before the first picture.
        after: Tokens of text after the last one, besides ``between``.
        between: Tokens of text after each.
    """
    family = MEDIA[name]
    ids = text(before, 1)
    for number, seed in enumerate(pictures):
        ids += [*family.item(config, number, seed)[1], *text(between, 10 + number)]
    ids += text(after, 2)
    return with_ids(name, torch.tensor([ids]), arguments_of(name, config, pictures))


def arguments_of(name: str, config: Any, pictures: list[int]) -> dict[str, torch.Tensor]:
    """Returns the arguments that carry these pictures."""
    family = MEDIA[name]
    items = [family.item(config, number, seed)[0] for number, seed in enumerate(pictures)]
    found = {key: torch.cat([item[key] for item in items], dim=family.dim) for key in (items[0] if items else ())}
    return {**found, **(family.whole(len(items)) if family.whole and items else {})}


def with_ids(name: str, ids: torch.Tensor, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the arguments of ``generate()`` for these ids and pictures."""
    types = {}
    for key, numbers in MEDIA[name].types.items():
        marks = torch.zeros_like(ids)
        for token, number in numbers.items():
            marks[ids == token] = number
        types[key] = marks
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **arguments}
