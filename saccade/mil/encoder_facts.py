"""Published tile encoders as a table of facts: loader, transform, sizes, and what tiles they were trained on.

Not in the table: CONCH v1.5, Hibou and MUSK, whose repositories run code of their own when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ENCODERS", "EncoderFacts", "Normalization"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class EncoderFacts:
    """What is known of a published encoder.

    Args:
        name: Name here.
        library: ``"timm"``, ``"open_clip"``, ``"transformers"`` or ``"conch"`` (a package of its authors).
        model: Architecture in that library; empty where the configuration is only in the repository of the weights.
        hub: Repository of the weights on the Hugging Face hub; empty for timm's own.
        dim: Width of the features.
        options: Arguments of the architecture.
        normalization: Mean and standard deviation.
        size: Side of the input in pixels.
        resize: Side that tiles are resized to before their middle is cut out; 0 is ``size``.
        pooling: ``"model"`` (the model's own), ``"cls"`` (class token), ``"cls+mean"`` (class token beside the mean of
            patch tokens), ``"stage3"`` (mean of the third stage's map), or ``"projection"`` (CLIP's image embedding).
        prefix_tokens: Class and register tokens, for ``"cls+mean"``.
        tile_px: Tile size it was trained for.
        mpp: Resolution it was trained for, microns per pixel.
        gated: Whether a licence must be accepted first.
        loads_from_hub: Whether its library can load it from there by itself; if not, the file must be named.
    """

    name: str
    library: str
    model: str
    hub: str
    dim: int
    options: Mapping[str, Any] = field(default_factory=dict)
    normalization: Normalization = IMAGENET
    size: int = 224
    pooling: str = "model"
    prefix_tokens: int = 1
    tile_px: int = 256
    mpp: float = 0.5
    gated: bool = False
    loads_from_hub: bool = True
    resize: int = 0


def swiglu(**options: Any) -> dict[str, Any]:  # noqa: ANN401 - timm's own
    """Return options of a vision transformer with packed SwiGLU; the layers are named, as timm is not imported yet."""
    return {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", **options}


VIRCHOW = swiglu(init_values=1e-5, mlp_ratio=5.3375, global_pool="", dynamic_img_size=True)
DYNAMIC: dict[str, Any] = {"dynamic_img_size": True}
KAIKO: tuple[tuple[str, str, str, int, dict[str, Any]], ...] = (
    ("S8", "vit_small_patch8_224", "vit_small_patch8_224", 384, DYNAMIC),
    ("S16", "vit_small_patch16_224", "vit_small_patch16_224", 384, DYNAMIC),
    ("B8", "vit_base_patch8_224", "vit_base_patch8_224", 768, DYNAMIC),
    ("B16", "vit_base_patch16_224", "vit_base_patch16_224", 768, DYNAMIC),
    ("L14", "vit_large_patch14_reg4_dinov2", "vit_large_patch14_reg4_224", 1024, {"img_size": 224, **DYNAMIC}),
)
ENCODERS: dict[str, EncoderFacts] = {
    facts.name: facts
    for facts in (
        EncoderFacts(
            "resnet50",
            "timm",
            "resnet50.tv_in1k",
            "",
            1024,
            {"features_only": True, "out_indices": (3,)},
            pooling="stage3",
        ),
        EncoderFacts(
            "UNI",
            "timm",
            "vit_large_patch16_224",
            "MahmoodLab/uni",
            1024,
            {"init_values": 1e-5, "dynamic_img_size": True},
            gated=True,
        ),
        EncoderFacts(
            "UNI2",
            "timm",
            "vit_giant_patch14_224",
            "MahmoodLab/UNI2-h",
            1536,
            swiglu(
                depth=24,
                num_heads=24,
                init_values=1e-5,
                embed_dim=1536,
                mlp_ratio=2.66667 * 2,
                no_embed_class=True,
                reg_tokens=8,
                dynamic_img_size=True,
            ),
            gated=True,
        ),
        EncoderFacts(
            "Virchow",
            "timm",
            "vit_huge_patch14_224",
            "paige-ai/Virchow",
            2560,
            VIRCHOW,
            pooling="cls+mean",
            tile_px=224,
            gated=True,
        ),
        EncoderFacts(
            "Virchow2",
            "timm",
            "vit_huge_patch14_224",
            "paige-ai/Virchow2",
            2560,
            {**VIRCHOW, "reg_tokens": 4},
            pooling="cls+mean",
            prefix_tokens=5,
            tile_px=224,
            gated=True,
        ),
        EncoderFacts(
            "GigaPath",
            "timm",
            "vit_giant_patch14_dinov2",
            "prov-gigapath/prov-gigapath",
            1536,
            {
                "img_size": 224,
                "patch_size": 16,
                "embed_dim": 1536,
                "depth": 40,
                "num_heads": 24,
                "mlp_ratio": 5.33334,
                "init_values": 1e-5,
            },
            resize=256,
            gated=True,
        ),
        *(
            EncoderFacts(
                f"H-optimus-{version}",
                "timm",
                "vit_giant_patch14_reg4_dinov2",
                f"bioptimus/H-optimus-{version}",
                1536,
                {"img_size": 224, "init_values": 1e-5, "global_pool": "token"},
                H_OPTIMUS,
                tile_px=224,
                gated=True,
            )
            for version in (0, 1)
        ),
        *(
            EncoderFacts(
                f"Kaiko-{name}",
                "timm",
                model,
                f"1aurent/{hub}.kaiko_ai_towards_large_pathology_fms",
                dim,
                options,
                HALF,
            )
            for name, model, hub, dim, options in KAIKO
        ),
        EncoderFacts(
            "Lunit-S8",
            "timm",
            "vit_small_patch8_224",
            "1aurent/vit_small_patch8_224.lunit_dino",
            384,
            normalization=LUNIT,
            tile_px=224,
        ),
        EncoderFacts(
            "GPFM",
            "timm",
            "vit_large_patch14_dinov2",
            "majiabo/GPFM",
            1024,
            {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
            tile_px=224,
            loads_from_hub=False,
        ),
        EncoderFacts(
            "H0-mini",
            "timm",
            "",
            "bioptimus/H0-mini",
            1536,
            swiglu(),
            H_OPTIMUS,
            pooling="cls+mean",
            prefix_tokens=5,
            tile_px=224,
            gated=True,
        ),
        EncoderFacts("Phikon", "transformers", "", "owkin/phikon", 768, pooling="cls", tile_px=224),
        EncoderFacts("Phikon-v2", "transformers", "", "owkin/phikon-v2", 1024, pooling="cls", tile_px=224),
        EncoderFacts(
            "Midnight", "transformers", "", "kaiko-ai/midnight", 3072, {}, HALF, pooling="cls+mean", tile_px=224
        ),
        EncoderFacts(
            "CONCH",
            "conch",
            "conch_ViT-B-16",
            "MahmoodLab/conch",
            512,
            normalization=CLIP,
            size=448,
            tile_px=512,
            gated=True,
        ),
        EncoderFacts(
            "BiomedCLIP",
            "open_clip",
            "",
            "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
            512,
            normalization=CLIP,
            tile_px=224,
        ),
        EncoderFacts("PLIP", "transformers", "", "vinid/plip", 512, {}, CLIP, pooling="projection", tile_px=224),
        EncoderFacts(
            "QuiltNet", "open_clip", "ViT-B-32-quickgelu", "wisdomik/QuiltNet-B-32", 512, {}, CLIP, tile_px=224
        ),
    )
}
