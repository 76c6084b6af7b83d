"""BiFormer and OverLoCK against their literal forms, and beside timm models of the same published accuracy.

One CPU thread, float32. Both forms of a model share their weights, and their logits are compared before they are timed.
"""

import copy
from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade.vision_backbones  # noqa: F401 (registers the models)
from benchmarks import literal_biformer, literal_overlock
from benchmarks.harness import compare, save

PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224", "nextvit_small")


def models(name: str, *, training: bool) -> dict[str, nn.Module]:
    """Return ours and its literal form, with the same weights; for inference each as fast as its own code makes it."""
    torch.manual_seed(0)
    model = timm.create_model(name).train(training)
    for parameter in model.parameters():  # layer scales and biases that start at zero would hide what differs
        nn.init.normal_(parameter, std=0.02) if parameter.ndim == 1 and not parameter.any() else None
    if name.startswith("biformer"):
        other = literal_biformer.literal(copy.deepcopy(model))
    else:
        other = literal_overlock.literal_form(model, merged=not training)
    if not training:
        model.reparameterize()
    return {"saccade": model, "literal": other}


def inference_cases(name: str) -> Iterator[dict[str, object]]:
    """Time one image of each size."""
    forms = models(name, training=False)
    for pixels, repeats in ((224, 7), (512, 5), (1024, 3)):
        images = torch.randn(1, 3, pixels, pixels)
        calls = {}
        with torch.inference_mode():
            got, expected = (form(images) for form in forms.values())
        difference = float((got - expected).abs().max() / expected.abs().max())
        for label, form in forms.items():

            def call(form: nn.Module = form, images: Tensor = images) -> Tensor:
                with torch.inference_mode():
                    return form(images)

            calls[label] = call
        title = f"{name}, inference, 1 image of {pixels} px (logits differ by {difference:.1e} of the largest)"
        yield compare(title, calls, unit="images", repeats=repeats) | {"difference": difference}


def training_case(name: str) -> dict[str, object]:
    """Time forward and backward of a batch of 8."""
    images, target = torch.randn(8, 3, 224, 224), torch.arange(8)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(images), target).backward()

    calls = {label: lambda model=model: step(model) for label, model in models(name, training=True).items()}
    return compare(f"{name}, training step, 8 images of 224 px", calls, work=8, unit="images", repeats=3)


def peer_case() -> dict[str, object]:
    """Time our models beside timm's at 224 pixels."""
    calls = {}
    for name in ("biformer_tiny", "overlock_xt", "overlock_t", *PEERS):
        model = timm.create_model(name).eval()
        if hasattr(model, "reparameterize"):
            model.reparameterize()

        def call(model: nn.Module = model, images: Tensor = torch.randn(4, 3, 224, 224)) -> Tensor:  # noqa: B008
            with torch.inference_mode():
                return model(images)

        calls[name] = call
    return compare("inference, 4 images of 224 px", calls, work=4, unit="images", repeats=5)


def main() -> None:
    """Run and save."""
    torch.set_num_threads(1)
    cases = []
    for name in ("biformer_tiny", "overlock_xt"):
        cases += list(inference_cases(name))
        cases.append(training_case(name))
    cases.append(peer_case())
    save("backbones", cases)


if __name__ == "__main__":
    main()
