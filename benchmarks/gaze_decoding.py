"""Sampling paths from OAT at its published size: all paths at once with cached keys, beside one by one without.

Width 512, 4 + 4 layers, 84 crops of 150 x 93 pixels, 12 steps. Without a cache each step of each path embeds the crops,
encodes the scene and decodes the whole prefix, as the official code does. One path is timed that way; a hundred take a
hundred times as long.
"""

import torch
from torch import Tensor

from benchmarks.harness import compare, save
from saccade.gaze import OAT, SceneBatch, grid_scene, sample
from saccade.gaze.oat import OATPaths

STEPS, PATHS = 12, 100


class EndlessPaths:
    """Paths that never end, so that both ways take the same number of steps."""

    def __init__(self, paths: OATPaths) -> None:
        self.paths = paths

    def step(self, tokens: Tensor) -> Tensor:
        """Score the next step, the end excluded."""
        return without_end(self.paths.step(tokens))

    def reorder(self, index: Tensor) -> None:
        """Go on with other paths."""
        self.paths.reorder(index)


class Endless:
    """OAT without an end.

    Args:
        model: The model.
    """

    def __init__(self, model: OAT) -> None:
        self.model = model

    def __call__(self, scenes: SceneBatch, paths: Tensor, viewers: Tensor | None = None) -> Tensor:
        """Score given paths."""
        return without_end(self.model(scenes, paths, viewers))

    def begin(self, scenes: SceneBatch, num_paths: int, max_length: int, viewers: Tensor | None = None) -> EndlessPaths:
        """Begin paths."""
        return EndlessPaths(self.model.begin(scenes, num_paths, max_length, viewers))


def without_end(logits: Tensor) -> Tensor:
    """Exclude the class that ends a path."""
    return torch.cat([torch.full_like(logits[..., :1], -torch.inf), logits[..., 1:]], -1)


@torch.inference_mode()
def one_by_one(model: Endless, scenes: SceneBatch, uniforms: Tensor) -> Tensor:
    """Sample paths ``(K, T)`` one after the other, everything computed anew at every step; uniforms ``(K, T)``."""
    paths = []
    for numbers in uniforms:
        path = torch.full((1, 1, 1), -1)
        for step, number in enumerate(numbers):
            logits = model(scenes, path[..., 1:])[0, 0, step, 1:]
            chosen = int((logits.softmax(-1).cumsum(-1) > number).int().argmax())
            path = torch.cat([path, torch.full((1, 1, 1), chosen)], -1)
        paths.append(path[0, 0, 1:])
    return torch.stack(paths)


def main() -> None:
    """Run and save."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Endless(OAT().eval())
    grid = grid_scene(6, 14, target=40)
    scenes = SceneBatch(grid.position, grid.valid, grid.start, grid.target, features=torch.rand(1, 84, 3, 150, 93))
    uniforms = torch.rand(1, PATHS, STEPS)
    cached = sample(model, scenes, PATHS, max_length=STEPS, uniforms=uniforms)
    literal = one_by_one(model, scenes, uniforms[0, :1])
    assert torch.equal(cached.objects[0, :1], literal), "both ways must sample the same path"
    ways = {
        f"{PATHS} paths at once, cached": lambda: sample(model, scenes, PATHS, max_length=STEPS, uniforms=uniforms),
        "1 path, cached": lambda: sample(model, scenes, 1, max_length=STEPS, uniforms=uniforms[:, :1]),
        "1 path without cache": lambda: one_by_one(model, scenes, uniforms[0, :1]),
    }
    case = compare(f"OAT, 84 crops, {STEPS} steps, 1 thread", ways, repeats=3)
    times = [row["median_ms"] for row in case["rows"].values()]  # type: ignore[attr-defined]
    case["hundred_one_by_one_over_at_once"] = ratio = PATHS * times[2] / times[0]
    print(f"  {PATHS} paths one by one without cache: {ratio:.0f} x the time of {PATHS} at once")
    save("gaze_decoding", [case])


if __name__ == "__main__":
    main()
