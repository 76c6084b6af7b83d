"""Small OAT models and scenes that the gaze tests share."""

import torch

from saccade.gaze.oat import OAT
from saccade.gaze.scenes import SceneBatch, grid_scene, stack_scenes
from tests.helpers import randn


def small_oat(**options: object) -> OAT:
    """Return a small model with random weights, the same every time, in evaluation mode."""
    torch.manual_seed(0)
    defaults = {"width": 24, "heads": 2, "hidden": 16, "encoder_layers": 1, "decoder_layers": 2, "seen": "nothing"}
    defaults |= {"position_rows": 4, "readout_scale": 4.0}
    model = OAT(**(defaults | options)).eval()
    with torch.no_grad():  # zero biases and viewers would hide mistakes
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(randn(*parameter.shape, seed=number) * 0.1)
    return model


def ragged_scenes() -> SceneBatch:
    """Return three scenes of 6, 12 and 2 objects, the last without a target."""
    return stack_scenes([grid_scene(2, 3, 4), grid_scene(3, 4, 0), grid_scene(1, 2)])


def padded(paths: list[list[list[int]]]) -> torch.Tensor:
    """Return nested lists of paths as ``(B, K, T)``, padded with -1."""
    longest = max(len(path) for scene in paths for path in scene)
    return torch.tensor([[path + [-1] * (longest - len(path)) for path in scene] for scene in paths])
