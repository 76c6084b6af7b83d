"""Trained aggregators from files: the architecture is read off the key names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from saccade.checkpoints import load_weights, read_state_dict
from saccade.errors import CheckpointError
from saccade.mil.abmil import ABMIL
from saccade.mil.acmil import ACMILGA, ACMILMHA
from saccade.mil.clam import CLAMMB, CLAMSB
from saccade.mil.dsmil import DSMIL
from saccade.mil.instance_pooling import MeanPooling
from saccade.mil.model import MILModel
from saccade.mil.transmil import TransMIL

__all__ = ["load_model", "model_from_weights"]

MILLAB = {
    "patch_embed.0.": "dimreduction.fc1.",
    "global_attn.attention_a.0.": "attention.attention_V.0.",
    "global_attn.attention_b.0.": "attention.attention_U.0.",
    "global_attn.attention_c.": "attention.attention_weights.",
    "classifier.": "classifier.fc.",
}


def load_model(path: str | Path, *, num_classes: int | None = None) -> MILModel:
    """Load a trained model of the ACMIL, CLAM, TransMIL, DSMIL or MIL-Lab repositories, or a saved model of ours.

    Sizes, branches, gates and biases follow from the weights; heads of attention, which leave no trace, are 8 as in the
    references. What matters in training alone (dropout, masking) has the references' defaults.

    Args:
        path: ``.pth``, ``.pt`` or ``.safetensors``; ``{"model": state}`` and the like are opened.
        num_classes: Of a new classifier, for weights that come without one (FEATHER).

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: If there is no such file.
        CheckpointError: If no known architecture has such keys, or the file is not safe to read.
    """
    return model_from_weights(read_state_dict(path), num_classes=num_classes, source=path)


def model_from_weights(
    state: Mapping[str, Tensor], *, num_classes: int | None = None, source: str | Path = "these weights"
) -> MILModel:
    """Build the model that has these weights; see :func:`load_model`.

    Args:
        state: Tensors by key.
        num_classes: Of a new classifier, for weights that come without one.
        source: Name of the file for messages.

    Raises:
        CheckpointError: If no known architecture has such keys.
    """
    state, _ = translate(state)
    model = build(state, num_classes=num_classes, source=source)
    if num_classes is not None and "classifier.fc.weight" not in state and isinstance(model, ABMIL):
        state |= {key: tensor for key, tensor in model.state_dict().items() if key.startswith("classifier.")}
    load_weights(model, state, source=source)
    return model.eval()


def build(state: Mapping[str, Tensor], *, num_classes: int | None = None, source: str | Path) -> MILModel:
    """Return the model, with new weights, that weights under our names belong to; see :func:`model_from_weights`."""
    try:
        model = architecture(state, num_classes)
    except KeyError as error:
        raise CheckpointError(f"{source} looks like a MIL model, but lacks {error}.") from error
    if model is None:
        raise CheckpointError(
            f"{source} holds no MIL model that saccade knows (ACMIL, ABMIL, CLAM, TransMIL, DSMIL, MIL-Lab); its "
            f"keys begin with {', '.join(list(state)[:3])}."
        )
    return model


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights under our names, and the keys of what is no weight of the model.

    Lightning's ``model.`` and the ``module.`` of CLAM's DataParallel go; CLAM's instance loss keeps labels of its own.
    """
    own, dropped = {}, []
    for key, tensor in state.items():
        if key.startswith("instance_loss_fn."):
            dropped.append(key)
        else:
            own[re.sub(r"^attention_net\.module\.", "attention_net.", key.removeprefix("model."))] = tensor
    return from_millab(own) if "patch_embed.0.weight" in own else own, dropped


def from_millab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the names of MIL-Lab's ABMIL."""
    translated = {}
    for key, tensor in state.items():
        old = next((prefix for prefix in MILLAB if key.startswith(prefix)), None)
        translated[key if old is None else MILLAB[old] + key.removeprefix(old)] = tensor
    return translated


def architecture(state: Mapping[str, Tensor], num_classes: int | None) -> MILModel | None:
    """Return a model of the shape that the keys tell, or ``None``."""
    if "sub_attention.0.q_proj.weight" in state:
        hidden, width = state["dimreduction.fc1.weight"].shape
        classes, branches = len(state["Slide_classifier.fc.weight"]), state["q"].shape[1]
        return ACMILMHA(width, classes, hidden, branches=branches)
    if "attention.attention_weights.weight" in state:
        hidden, width = state["dimreduction.fc1.weight"].shape
        rows, inner = state["attention.attention_weights.weight"].shape
        if "Slide_classifier.fc.weight" in state:
            return ACMILGA(width, len(state["Slide_classifier.fc.weight"]), hidden, inner, branches=rows)
        head = state.get("classifier.fc.weight")
        if head is None and num_classes is None:
            raise CheckpointError("These weights come without a classifier: say num_classes for a new one.")
        return ABMIL(
            width,
            len(head) if head is not None else num_classes or 1,
            hidden,
            inner,
            gated="attention.attention_U.0.weight" in state,
            projection_bias="dimreduction.fc1.bias" in state,
        )
    if "attention_net.0.weight" in state:
        return clam(state)
    if "cls_token" in state and "pos_layer.proj.weight" in state:
        hidden, width = state["_fc1.0.weight"].shape
        return TransMIL(width, len(state["_fc2.weight"]), hidden, len(state["layer1.attn.res_conv.weight"]))
    if "b_classifier.fcc.weight" in state:
        classes, _, width = state["b_classifier.fcc.weight"].shape
        return DSMIL(
            state["i_classifier.fc.0.weight"].shape[1],
            classes,
            nonlinear="b_classifier.q.2.weight" in state,
            project_values="b_classifier.v.1.weight" in state,
        )
    if "head.3.weight" in state:
        hidden, width = state["head.0.weight"].shape
        return MeanPooling(width, len(state["head.3.weight"]), hidden)
    return None


def clam(state: Mapping[str, Tensor]) -> MILModel:
    """Return the CLAM of these weights."""
    hidden, width = state["attention_net.0.weight"].shape
    gated = "attention_net.3.attention_a.0.weight" in state
    inner = len(state["attention_net.3.attention_a.0.weight" if gated else "attention_net.3.module.0.weight"])
    dropout = 0.25 if gated or "attention_net.3.module.3.weight" in state else 0.0
    classes = sum(bool(re.fullmatch(r"instance_classifiers\.\d+\.weight", key)) for key in state)
    variant = CLAMSB if "classifiers.weight" in state else CLAMMB
    return variant(width, classes, (hidden, inner), gated=gated, dropout=dropout)
