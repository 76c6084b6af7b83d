"""Fine-tuning: the classifier layer of a model, and weights from elsewhere under it."""

from __future__ import annotations

from torch import nn

from saccade.checkpoints import filter_state_dict, match_keys, read_state_dict
from saccade.errors import CheckpointError
from saccade.vision_backbones.loading import load_model

__all__ = ["classifier_layers", "load_starting_weights"]


def classifier_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the classifier layer of a timm model; distilled models have two."""
    classifier: nn.Module | tuple[nn.Module, ...] = model.get_classifier()  # type: ignore[operator]
    return tuple(classifier) if isinstance(classifier, tuple | list) else (classifier,)


def load_starting_weights(model: nn.Module, path: str) -> None:
    """Load weights for fine-tuning.

    The classifier keeps its own if the file's has another shape or is absent, and so do layers that were added to the
    model, token-aware average pooling, if the file knows none.

    Raises:
        CheckpointError: If anything else does not fit.
    """
    state = load_model(path).model.state_dict() if path.endswith(".ckpt") else read_state_dict(path)
    state = filter_state_dict(state, model)
    heads = classifier_layers(model)
    head_keys = {
        key for key, value in model.named_parameters() if any(value is own for h in heads for own in h.parameters())
    }
    own = model.state_dict()
    kept = {key: value for key, value in state.items() if key not in head_keys or value.shape == own[key].shape}
    report = match_keys(kept, model)
    added = {key for key in own if ".dilation_predictor." in key}
    fresh = head_keys | (added if added.isdisjoint(kept) else set())
    if report.unexpected or report.reshaped or set(report.missing) - fresh:
        raise CheckpointError(f"The weights in {path} do not fit {type(model).__name__}: {report}.")
    model.load_state_dict(kept, strict=False)
