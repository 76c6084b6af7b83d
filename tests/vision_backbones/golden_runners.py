"""Golden runners of the backbones: what the families share, and the full-size models."""

import zlib
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from tests.golden.case import Case
from tests.golden.runners import runner


def prepared(model: nn.Module, case: Case) -> nn.Module:
    """Load the case's weights, every key accounted for, and set the mode."""
    model.load_state_dict(case.group("state"))
    return model.train(case.entry["mode"] == "train")


def wanted_gradients(case: Case, loss: Tensor, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients that are stored, of parameters and inputs."""
    tensors = {f"grad.state.{name}": parameter for name, parameter in model.named_parameters()}
    tensors |= {f"grad.input.{name}": tensor for name, tensor in inputs.items()}
    names = [name for name in case.expected() if name.startswith("grad.")]
    return dict(zip(names, torch.autograd.grad(loss, [tensors[name] for name in names]), strict=True))


def run_block(case: Case, block: nn.Module, words: list[str]) -> Tensor:
    """Compare the output of a block and every gradient; return the output."""
    inputs = case.group("input")
    cotangent = inputs.pop("cotangent")
    out = prepared(block, case)(*[inputs[word].requires_grad_() for word in words])
    loss = (out * cotangent).sum()
    case.compare({"output.out": out} | wanted_gradients(case, loss, block, {word: inputs[word] for word in words}))
    return out


def seeded_weight(key: str, like: Tensor, salt: str, gain: float) -> Tensor:
    """Return the weight that the index's ``seeded_weights`` prescribes for an official key."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(like)
    seed = zlib.crc32((salt + key).encode()) & 0xFFFFFFFF
    g = np.random.RandomState(seed).standard_normal(like.numel()).reshape(like.shape)
    word, fan = key.rpartition(".")[2], like.numel() // max(1, like.shape[0])
    if word == "running_mean":
        g = 0.1 * g
    elif word == "running_var":
        g = 1 + 0.1 * np.abs(g)
    elif word == "weight":
        g = 1 + 0.1 * g if fan == 1 else gain * g / np.sqrt(fan)
    else:
        g = 0.1 * g
    return torch.from_numpy(g).to(like)


def formula_image(rows: int, columns: int) -> Tensor:
    """Return the image that the index describes, ``(1, 3, H, W)``, for a map of that size at stride 4."""
    c, i, j = np.ogrid[:3, : 4 * rows, : 4 * columns]
    waves = np.sin(0.05 * (c + 1) * i + 0.3 * c) * np.cos(0.07 * (c + 1) * j)
    return torch.from_numpy(waves + 0.5 * np.sin(0.011 * i * j / (1 + 0.01 * i) + c)).float()[None]


def fits(map_: Tensor, statistics: dict[str, Any]) -> bool:
    """Whether a map has the mean, standard deviation, largest value and first values that were recorded."""
    values = map_.double()
    got = [values.mean(), values.std(correction=0), values.abs().max(), *values.flatten()[:8]]
    expected = [statistics[name] for name in ("mean", "std", "abs_max")] + statistics["first8"]
    limit = 1e-5 * statistics["abs_max"]
    return list(map_.shape) == statistics["shape"] and all(
        abs(float(a) - b) <= limit for a, b in zip(got, expected, strict=True)
    )


@runner("backbones.full_size")
def full_size(case: Case) -> None:
    """A registered model with weights made from their names: keys, shapes, number of weights, stages, logits."""
    document = case.document()
    has_auxiliary = any("aux_logits" in name for name in case.tensors)
    model = timm.create_model(document["variant"], **({"aux_head": True} if has_auxiliary else {}))
    assert sum(p.numel() for p in model.parameters()) == document["parameters"]
    own = model.state_dict()
    described = {key: (tuple(value.shape), str(value.dtype)) for key, value in own.items()}
    assert described == {key: (tuple(shape), f"torch.{dtype}") for key, shape, dtype in document["state_dict"]}
    salt, gain = document["salt"], document["gain"]
    model.load_state_dict({key: seeded_weight(key, value, salt, gain) for key, value in own.items()})
    got = {}
    with torch.inference_mode():
        for run in document["runs"]:
            image = formula_image(*run["stages"]["stage1"]["shape"][2:])
            features, maps = model.eval().forward_intermediates(image)
            assert fits(maps[0], run["stages"]["stage1"])
            assert fits(maps[1], run["stages"]["stage2"])
            assert fits(features, run["stages"]["features"])
            got[f"output.{run['run']}.logits"] = model.forward_head(features)
            if has_auxiliary:
                got[f"output.{run['run']}.aux_logits"] = model.aux_head(model.encode(image)[1])
    case.compare(got)
