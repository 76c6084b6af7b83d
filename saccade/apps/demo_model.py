"""A LLaVA with random weights in a folder, complete with tokenizer, image processor and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["write_random_llava"]

TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    " ASSISTANT:{% endfor %}"
)


def write_random_llava(
    folder: Path,
    *,
    context: int = 512,
    image_px: int = 112,
    patch_px: int = 8,
    width: int = 64,
    layers: int = 6,
    gain: float = 10.0,
) -> Path:
    """Write a decoder with four heads over single bytes, behind a small vision tower; its answers are noise.

    Args:
        folder: Where to.
        context: Longest sequence in tokens.
        image_px: Side of the pictures that the vision tower sees.
        patch_px: Side of a patch, one visual token.
        width: Of the decoder.
        layers: Of the decoder.
        gain: Of the decoder's weights over those at the start of training, whose attention is all even.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    t: Any = transformers  # mypy does not know all arguments that its classes take

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": image_px, "width": image_px}
    processor = t.LlavaProcessor(
        t.CLIPImageProcessor(size={"shortest_edge": image_px}, crop_size=size),
        tokenizer,
        patch_size=patch_px,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_px,
            patch_size=patch_px,
        ),
        text_config=t.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 3 // 2,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = t.LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.data *= gain if "language_model" in name else 5
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
