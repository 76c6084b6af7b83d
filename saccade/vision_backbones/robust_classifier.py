"""Training of robust image classifiers: token-aware average pooling, attention diversification, patches augmented."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.errors import ConfigError
from saccade.vision_backbones.classifier import ImageClassifier
from saccade.vision_backbones.diversity import DiversityCollector
from saccade.vision_backbones.patch_augmentation import patch_wise_augmentation
from saccade.vision_backbones.token_pooling_hooks import set_pooling_norm

__all__ = ["RobustClassifier"]


class RobustClassifier(ImageClassifier):
    """An :class:`ImageClassifier` whose loss also asks for diverse attention: cross entropy + weight x diversity.

    The backbone is any model that :class:`saccade.vision_backbones.diversity.DiversityCollector` knows: saccade's FAN
    and RVT, timm's ViT, DeiT, BEiT, EVA, Swin, ... Everything that ``ImageClassifier`` does works here too; its
    checkpoints are read by the same commands.

    Logged besides: ``train/ce``, the cross entropy, and ``train/adl``, the diversity loss before its weight;
    ``train/loss`` is the whole.

    Args:
        backbone: timm name, saccade's own models included.
        num_classes: Number of classes.
        backbone_kwargs: Further arguments of the backbone's constructor.
        token_pooling_scales: Give the blocks of a plain ViT token-aware average pooling with so many branches (4 in
            the paper); ``None`` leaves the backbone as it is. Backbones that have the layer take their own argument.
        token_pooling_norm: Statistics of the batch norms in that layer: ``"batch"``, of all processes (``"sync"``, on
            GPUs), or ``"frozen"``: the running ones, for fine-tuning with small batches.
        diversity_weight: Weight of the diversity loss; 0 computes none.
        diversity_threshold: Multiple of the uniform weight above which attention counts.
        diversity_layers: Layers of attention that take part, by position; ``None`` means all.
        diversity_every: The diversity loss counts in every so many-th batch.
        patch_augmentation: Train on each batch twice, once with patches of 16 pixels changed at random, as RVT does;
            diversity counts where they are not. The two cross entropies add up.
        **kwargs: The other ones of ``ImageClassifier``.

    Raises:
        ConfigError: As ``ImageClassifier`` does; if the backbone has no spatial attention to diversify; if it cannot
            pool; or if an option is out of range.

    Source:
        Guo et al., "Robustifying Token Attention for Vision Transformers", ICCV 2023; Mao et al., "Towards Robust
        Vision Transformer", CVPR 2022.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        backbone_kwargs: dict[str, Any] | None = None,
        token_pooling_scales: int | None = None,
        token_pooling_norm: Literal["batch", "sync", "frozen"] = "batch",
        diversity_weight: float = 1.0,
        diversity_threshold: float = 2.0,
        diversity_layers: list[int] | None = None,
        diversity_every: int = 1,
        patch_augmentation: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if diversity_weight < 0 or diversity_threshold < 0 or diversity_every < 1:
            raise ConfigError(
                "diversity_weight and diversity_threshold must not be negative and diversity_every at least 1; got "
                f"{diversity_weight}, {diversity_threshold} and {diversity_every}."
            )
        pooling = {} if token_pooling_scales is None else {"token_pooling_scales": token_pooling_scales}
        super().__init__(backbone, num_classes, backbone_kwargs={**(backbone_kwargs or {}), **pooling}, **kwargs)
        if token_pooling_norm != "batch":
            set_pooling_norm(self.model, token_pooling_norm)
        self.diversity_weight = diversity_weight
        self.diversity_every = diversity_every
        self.diversity: DiversityCollector | None = None
        if diversity_weight > 0:
            self.diversity = DiversityCollector(self.model, threshold=diversity_threshold, layers=diversity_layers)
        self.patch_augmentation = patch_augmentation
        mean, std = (torch.tensor(self.data_config[name]) for name in ("mean", "std"))
        self.black: Tensor
        self.white: Tensor
        self.register_buffer("black", -mean / std, persistent=False)
        self.register_buffer("white", (1 - mean) / std, persistent=False)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of ``batch["image"]`` and ``batch["target"]``, mixed if asked for."""
        images, target = self.mix(batch)
        values: dict[str, Tensor] = {}
        diversity = self.diversity
        if diversity is not None:
            diversity.enabled = batch_idx % self.diversity_every == 0
        if self.patch_augmentation:
            changed = patch_wise_augmentation(images, self.black, self.white)
            values["ce_patches"] = self.loss(self.model(changed), target)
        if diversity is None or not diversity.enabled:
            logits = self.model(images)
        else:
            with diversity:
                logits = self.model(images)
            values["adl"] = diversity.loss()
        values["ce"] = self.loss(logits, target)
        loss = values["ce"] + values.get("ce_patches", 0.0) + self.diversity_weight * values.get("adl", 0.0)
        self.log_training(logits, target, {"loss": loss, **values})
        return loss
