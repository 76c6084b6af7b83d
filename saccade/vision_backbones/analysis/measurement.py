"""What is measured of every head of a model on every image: one row of figures per head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.attention import attention_diversification_from_maps
from saccade.errors import ConfigError
from saccade.vision_backbones.analysis.layers import AttentionLayer, find_layers, watch_layers
from saccade.vision_backbones.analysis.profile import attention_profile
from saccade.vision_backbones.analysis.pruning import PRUNING_METRICS, HeadPruning, gate_gradients, has_classes

__all__ = ["IMPORTANCE", "HeadMeasurement"]

IMPORTANCE = ("zero", "mean", "none")
SPREAD = ("prefix_mass", "entropy", "entropy_share", "mean_distance", "largest_column", "sink_rate", "diversification")
SINK = 0.3  # importance above which a key is a sink
MAP_STACK = 8  # images whose matrices are held at a time


class HeadMeasurement:
    """Measures every head of a model, image by image; rows of many images are averaged afterwards.

    Columns, for each head: those of :class:`saccade.vision_backbones.analysis.AttentionProfile` by name
    (``mass_by_hop_0``, ``mean_per_neighbour_by_hop_0``, ...; NaN beyond the last hop of a layer's grid);
    ``sink_rate``, 1 if a key, prefix tokens included, gets more than 0.3 of the head's attention on average, else 0;
    ``diversification``, the layer's attention diversification, the same for all its heads: overfocusing; with
    importance the metrics of :class:`saccade.vision_backbones.analysis.HeadPruning` and ``gate_gradient``.

    Args:
        model: In evaluation mode.
        input_size: Channels, rows and columns of its input.
        importance: ``"zero"`` or ``"mean"``: what a pruned head's output becomes, ``"mean"`` after
            ``measurement.pruning.means`` has been set; ``"none"`` leaves importance out.

    Attributes:
        layers: The layers of the model.
        heads: Layer and head, both from 0, of each row.
        columns: Names of the figures.

    Raises:
        ConfigError: If the model's attention is not global, or its heads cannot be pruned.

    Example:
        >>> import timm
        >>> measurement = HeadMeasurement(timm.create_model("test_vit", img_size=32).eval(), (3, 32, 32))
        >>> values, logits = measurement.measure(torch.randn(2, 3, 32, 32))
        >>> values.shape == (2, len(measurement.heads), len(measurement.columns))
        True
    """

    def __init__(self, model: nn.Module, input_size: Sequence[int], *, importance: str = "zero") -> None:
        if importance not in IMPORTANCE:
            raise ConfigError(f"importance must be one of {', '.join(IMPORTANCE)}; got {importance!r}.")
        self.model = model
        self.layers: list[AttentionLayer] = find_layers(model, input_size)
        self.heads = [(i, head) for i, layer in enumerate(self.layers) for head in range(layer.num_heads)]
        self.num_hops = max(max(layer.grid) for layer in self.layers)
        self.pruning = None if importance == "none" else HeadPruning(model, self.layers, input_size)
        by_hop = [f"{name}_{k}" for name in ("mass_by_hop", "mean_per_neighbour_by_hop") for k in range(self.num_hops)]
        self.columns = [*SPREAD, *by_hop]
        if self.pruning is not None:
            self.columns += [*PRUNING_METRICS, "gate_gradient"]

    @torch.no_grad()
    def measure(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Measure all heads on a batch.

        Args:
            images: ``(B, C, Y, X)``, on the device of the model.
            labels: True classes, ``(B,)``; ``None`` means those that the model predicts.

        Returns:
            The figures ``(B, T, F)`` for T heads and F columns, float32 on the CPU; and the logits ``(B, K)``.
        """
        if self.pruning is None:
            parts = [self.spread(part) for part in images.split(MAP_STACK)]
            return torch.cat([figures for figures, _ in parts]), torch.cat([logits for _, logits in parts])
        effects, logits = self.pruning.measure(images, labels)
        figures = torch.cat([self.spread(part)[0] for part in images.split(MAP_STACK)])
        if has_classes(self.model):
            gradients = gate_gradients(self.model, self.layers, images, labels).unsqueeze(-1)
        else:
            gradients = torch.full_like(figures[..., :1], torch.nan)
        return torch.cat([figures, effects.to(figures), gradients], -1), logits

    def spread(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the matrices show, ``(B, T, F')``, and the logits ``(B, K)``, on the CPU."""
        found: list[Tensor] = []
        with watch_layers(self.model, self.layers, lambda index, maps: found.append(self.layer_figures(index, maps))):
            out = self.model(images).float().cpu()
        return torch.cat(found, 1), out if has_classes(self.model) else out[:, :0]

    def layer_figures(self, index: int, maps: Tensor) -> Tensor:
        """Return the figures of one layer, ``(B, H, F')`` on the CPU, of its matrices."""
        layer = self.layers[index]
        prefix = layer.prefix_tokens
        profile = attention_profile(maps, layer.grid, prefix_tokens=prefix)
        strongest = maps.mean(2).amax(-1)  # importance in `attention_statistics`: here every query sees every key
        focus = torch.stack([attention_diversification_from_maps(one[None], prefix_tokens=prefix) for one in maps])
        figures = [
            profile.prefix_mass,
            profile.entropy,
            profile.entropy_share,
            profile.mean_distance,
            profile.largest_column,
            (strongest > SINK).to(maps.dtype),
            focus[:, None].expand(-1, layer.num_heads),
        ]
        missing = maps.new_full((*maps.shape[:2], self.num_hops - max(layer.grid)), torch.nan)
        by_hop = [profile.mass_by_hop, missing, profile.mean_per_neighbour_by_hop, missing]
        return torch.cat([torch.stack(figures, -1), *by_hop], -1).cpu()
