"""The prompt of one call: which tokens are pictures, padding, the user's words; the same for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saccade.errors import ConfigError, DataError, ShapeError

__all__ = ["Prompt", "make_prompt"]


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the decoder sees them.

    Args:
        image_mask: Positions of visual tokens, bool ``(B, N)``. Several pictures, videos and pictures with tokens in
            between are all just positions.
        valid: Positions that are not padding, bool ``(B, N)``.
        input_ids: ``(B, N)``, or ``None`` if the caller gave embeddings.
        query_mask: Positions of the user's words, bool ``(B, N)``, or ``None`` if nobody has said.
    """

    image_mask: Tensor
    valid: Tensor
    input_ids: Tensor | None = None
    query_mask: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.image_mask.shape[0]

    @property
    def length(self) -> int:
        """N, padding included."""
        return self.image_mask.shape[1]

    @cached_property
    def after_image(self) -> list[int]:
        """For each sample, the first position behind its last visual token; N if it has none."""
        return behind_last(self.image_mask, missing=self.length)

    @cached_property
    def last_row(self) -> list[int]:
        """For each sample, the position of its last token that is not padding."""
        return [stop - 1 for stop in behind_last(self.valid, missing=self.length)]

    @cached_property
    def num_visual(self) -> Tensor:
        """Number of visual tokens, ``(B,)``."""
        return self.image_mask.sum(1)

    def require_images(self, who: str) -> None:
        """Raise unless every sample has a visual token.

        Raises:
            DataError: With reason ``no_image_token``.
        """
        missing = [sample for sample, has_image in enumerate(self.image_mask.any(1).tolist()) if not has_image]
        if missing:
            raise DataError(
                f"{who} needs an image, and sample {missing[0]} of the batch has no image token in its prompt. "
                "Put the placeholder into the prompt (the processor's chat template does), or pass image_mask.",
                reason="no_image_token",
            )

    def expand(self, times: int) -> Prompt:
        """Repeat every sample, as beams and ``num_return_sequences`` do."""
        if times == 1:
            return self
        repeated = (
            None if t is None else t.repeat_interleave(times, 0)
            for t in (self.image_mask, self.valid, self.input_ids, self.query_mask)
        )
        return Prompt(*repeated)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Prompt:
        """Return the prompt on a device."""
        moved = (
            None if t is None else t.to(device) for t in (self.image_mask, self.valid, self.input_ids, self.query_mask)
        )
        return Prompt(*moved)  # type: ignore[arg-type]


def behind_last(mask: Tensor, *, missing: int) -> list[int]:
    """Return for each row the index behind its last ``True``, or ``missing``."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return [int(stop) or missing for stop in (mask * places).amax(1).tolist()]


def make_prompt(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    visual_token_ids: tuple[int, ...],
    image_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Prompt:
    """Describe a prompt.

    Args:
        input_ids: ``(B, N)``, or ``None`` if the model is called with embeddings.
        attention_mask: ``(B, N)``, nonzero where a token is not padding; ``None`` means no padding.
        visual_token_ids: Placeholder ids of the model.
        image_mask: Visual positions, bool ``(B, N)``, in place of the placeholders.
        query_mask: The user's words, bool ``(B, N)``.

    Raises:
        ConfigError: If neither ids nor a mask say where the images are.
        ShapeError: If a mask has another shape.
    """
    if image_mask is None:
        if input_ids is None:
            raise ConfigError(
                "The model was called with inputs_embeds, which do not say where the images are. Pass input_ids, or "
                "intervene(..., image_mask=) with bool (batch, tokens), True at visual tokens."
            )
        ids = torch.tensor(visual_token_ids, dtype=torch.long, device=input_ids.device)
        image_mask = torch.isin(input_ids, ids)
    shape = tuple(image_mask.shape if input_ids is None else input_ids.shape)
    for name, mask in (("image_mask", image_mask), ("query_mask", query_mask)):
        if mask is not None and (tuple(mask.shape) != shape or mask.dtype != torch.bool):
            raise ShapeError(
                f"{name} must be bool of the shape of the prompt, {shape}; got {mask.dtype} {tuple(mask.shape)}."
            )
    if attention_mask is not None and attention_mask.ndim == 2 and tuple(attention_mask.shape) == shape:
        valid = attention_mask != 0
    else:
        valid = torch.ones(shape, dtype=torch.bool, device=image_mask.device)
    return Prompt(image_mask.to(valid.device) & valid, valid, input_ids, query_mask)
