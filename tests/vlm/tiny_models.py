"""Thirteen families of multimodal models, tiny and random, and a prompt for each."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
IMAGE, VIDEO, START, END = 119, 118, 117, 116
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


@dataclass(frozen=True)
class Tiny:
    """One model with the picture part of its inputs.

    Args:
        model: In eval mode, float32.
        visual: Token ids that stand for one picture.
        pixels: Picture inputs of one sample; batches concatenate them.
        own_generate: The family generates through its decoder's own method.
    """

    model: Any
    visual: list[int]
    pixels: dict[str, Tensor]
    own_generate: bool = False
    extra: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, *texts: list[int], padding: int = 0) -> dict[str, Tensor]:
        """Return a left-padded batch of prompts ``1 5 9 PICTURE text``.

        Args:
            texts: Token ids behind the picture, one list per sample.
            padding: More padding in front than the longest sample needs.
        """
        rows = [[1, 5, 9, *self.visual, *text] for text in texts]
        length = max(map(len, rows)) + padding
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        found = {"input_ids": ids, "attention_mask": mask}
        found |= {name: torch.cat([pixels] * len(rows)) for name, pixels in self.pixels.items()}
        config = self.model.config
        if config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            found["mm_token_type_ids"] = (ids == config.image_token_id).long()
        if config.model_type in ("paligemma", "gemma3"):
            found["token_type_ids"] = (ids == config.image_token_id).long()
        if config.model_type == "instructblip":
            found["qformer_input_ids"] = torch.tensor([[3, 4, 5]] * len(rows))
            found["qformer_attention_mask"] = torch.ones(len(rows), 3, dtype=torch.long)
        return found


def pixels(*shape: int) -> Tensor:
    """Return normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def rough(model: Any) -> Any:
    """Return the model in eval mode with weights large enough for uneven attention."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim >= 2:
            fan_in = weight[0].numel()
            spread = 1.0 if "embed" in name else 1.6 / fan_in**0.5
            weight.data = torch.randn(weight.shape, generator=generator) * spread
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**TEXT)


def qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**TEXT)


def llava() -> Tiny:
    import transformers as t

    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**CLIP), text_config=llama(), image_token_id=IMAGE, vision_feature_layer=-2
    )
    return Tiny(t.LlavaForConditionalGeneration(config), [IMAGE] * 16, {"pixel_values": pixels(1, 3, 16, 16)})


def llava_next() -> Tiny:
    import transformers as t

    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**CLIP),
        text_config=llama(),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[16, 16], [16, 32]],
    )
    values = {"pixel_values": pixels(1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    return Tiny(t.LlavaNextForConditionalGeneration(config), [IMAGE] * 36, values)


def llava_onevision() -> Tiny:
    import transformers as t

    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**CLIP),
        text_config=qwen2(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16], [16, 32]],
    )
    values = {"pixel_values": pixels(1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    return Tiny(t.LlavaOnevisionForConditionalGeneration(config), [IMAGE] * 36, values)


def qwen2_vl() -> Tiny:
    import transformers as t

    config = t.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=QWEN_VISION, **TOKENS)
    values = {"pixel_values": pixels(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    return Tiny(t.Qwen2VLForConditionalGeneration(config), [START, *[IMAGE] * 16, END], values)


def qwen2_5_vl() -> Tiny:
    import transformers as t

    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = t.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **TOKENS)
    values = {"pixel_values": pixels(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    return Tiny(t.Qwen2_5_VLForConditionalGeneration(config), [START, *[IMAGE] * 16, END], values)


def qwen3_vl() -> Tiny:
    import transformers as t

    vision = {
        "depth": 3,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    config = t.Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS, tie_word_embeddings=False)
    values = {"pixel_values": pixels(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    return Tiny(t.Qwen3VLForConditionalGeneration(config), [START, *[IMAGE] * 16, END], values)


def internvl() -> Tiny:
    import transformers as t

    vision = {**CLIP, "image_size": [16, 16], "patch_size": [4, 4]}
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**vision), text_config=qwen2(), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return Tiny(
        t.InternVLForConditionalGeneration(config), [START, *[IMAGE] * 4, END], {"pixel_values": pixels(1, 3, 16, 16)}
    )


def idefics3(kind: str = "Idefics3") -> Tiny:
    import transformers as t

    vision = getattr(t, f"{kind}VisionConfig")(**CLIP)
    config = getattr(t, f"{kind}Config")(
        vision_config=vision, text_config=llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    model = getattr(t, f"{kind}ForConditionalGeneration")(config)
    # Two tiles with tokens of their row and column between them, as the processors write them.
    visual = [START, 20, *[IMAGE] * 4, START, 21, *[IMAGE] * 4, END]
    return Tiny(model, visual, {"pixel_values": pixels(1, 2, 3, 16, 16)})


def smolvlm() -> Tiny:
    return idefics3("SmolVLM")


def paligemma() -> Tiny:
    import transformers as t

    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**CLIP, projection_dim=32, vision_use_head=False),
        text_config=t.GemmaConfig(**TEXT, head_dim=8),
        image_token_id=IMAGE,
        projection_dim=32,
        tie_word_embeddings=False,
    )
    return Tiny(t.PaliGemmaForConditionalGeneration(config), [IMAGE] * 16, {"pixel_values": pixels(1, 3, 16, 16)})


def gemma3() -> Tiny:
    import transformers as t

    text = {**TEXT, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**CLIP, vision_use_head=False),
        text_config=t.Gemma3TextConfig(**text),
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    return Tiny(
        t.Gemma3ForConditionalGeneration(config), [START, *[IMAGE] * 4, END], {"pixel_values": pixels(1, 3, 16, 16)}
    )


QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 16,
    "vocab_size": 30,
    "cross_attention_frequency": 1,
}


def blip_2() -> Tiny:
    import transformers as t

    text = {name: value for name, value in TEXT.items() if name not in ("intermediate_size", "num_key_value_heads")}
    config = t.Blip2Config(
        vision_config=t.Blip2VisionConfig(**CLIP).to_dict(),
        qformer_config=t.Blip2QFormerConfig(**QFORMER).to_dict(),
        text_config=t.OPTConfig(**text, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=True).to_dict(),
        num_query_tokens=6,
        image_token_index=IMAGE,
    )
    model = t.Blip2ForConditionalGeneration(config)
    return Tiny(model, [IMAGE] * 6, {"pixel_values": pixels(1, 3, 16, 16)}, own_generate=True)


def instructblip() -> Tiny:
    import transformers as t

    config = t.InstructBlipConfig(
        vision_config=t.InstructBlipVisionConfig(**CLIP).to_dict(),
        qformer_config=t.InstructBlipQFormerConfig(**QFORMER).to_dict(),
        text_config=llama().to_dict(),
        num_query_tokens=6,
        image_token_index=IMAGE,
    )
    model = t.InstructBlipForConditionalGeneration(config)
    return Tiny(model, [IMAGE] * 6, {"pixel_values": pixels(1, 3, 16, 16)}, own_generate=True)


FAMILIES = {
    build.__name__: build
    for build in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        idefics3,
        smolvlm,
        paligemma,
        gemma3,
        blip_2,
        instructblip,
    )
}


@cache
def tiny(family: str) -> Tiny:
    """Return the model of a family; the same object each time, so tests must leave it as it was."""
    torch.manual_seed(0)
    found = FAMILIES[family]()
    rough(found.model)
    if found.own_generate:
        found.model.language_model.generation_config.eos_token_id = None
    return found


def generate(found: Tiny, inputs: dict[str, Tensor], count: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the new tokens of greedy generation, ``(B, count)``, and the logits they were chosen by, without beams."""
    settings = {
        "max_new_tokens": count,
        "do_sample": False,
        "eos_token_id": None,
        "suppress_tokens": [116, 117, 118, 119],
        **options,
    }
    result = found.model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    return result.sequences[:, -count:], torch.stack(result.logits, 1)
