"""What TAP and ADL cost FAN-S-Hybrid: time of a training step, memory at 1024 pixels, inference beside XCiT and DeiT.

One CPU thread, float32; seconds of CPU time, so that others on the machine disturb little. The literal form shares the
weights; logits and loss are compared before anything is timed. Its memory at 1024 pixels is measured with one and with
two blocks and continued in a straight line to all ten: the whole would hold about 15 GiB.
"""

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import saccade.vision_backbones  # noqa: F401 (registers the models)
from benchmarks.harness import compare, save
from benchmarks.literal_fan import LiteralFAN
from saccade.apps.measure import peak_memory
from saccade.vision_backbones.diversity import DiversityCollector

PLAIN, POOLED = "fan_small_12_p4_hybrid", "tap_fan_small_12_p4_hybrid"
DEPTH = 10  # blocks of FAN-S-Hybrid
PEERS = ("xcit_small_12_p16_224", "deit_small_patch16_224")
GIB = 2**30


def build(name: str, **options: int) -> nn.Module:
    """Return a model whose attention is far from uniform, as a trained one's is."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(8)
            block.attn.kv.weight.mul_(8)
    return model.train()


def diverse_step(model: nn.Module, images: Tensor, target: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a training step with ADL."""
    collector = DiversityCollector(model)

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with collector:
            logits = model(images)
        loss = collector.loss()
        (F.cross_entropy(logits, target) + loss).backward()
        return logits.detach(), loss.detach()

    return step


def plain_step(model: nn.Module, images: Tensor, target: Tensor) -> Callable[[], None]:
    """Return a training step."""

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), target).backward()

    return step


def literal_step(model: nn.Module, images: Tensor, target: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a training step of the literal form with ADL."""

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits, loss = model(images)
        (F.cross_entropy(logits, target) + loss).backward()
        return logits.detach(), loss.detach()

    return step


def difference(ours: Callable[[], tuple[Tensor, Tensor]], literal: Callable[[], tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference of logits and loss, relative to the largest value."""
    pairs = zip(ours(), literal(), strict=True)
    return max(float((got - want).abs().max() / want.abs().max().clamp(min=1e-12)) for got, want in pairs)


def training_case() -> dict[str, object]:
    """Time a training step of 8 images."""
    images, target = torch.randn(8, 3, 224, 224), torch.arange(8)
    pooled = build(POOLED)
    literal = literal_step(LiteralFAN(pooled), images, target)
    calls = {
        "saccade, TAP and ADL": diverse_step(pooled, images, target),
        "saccade, without both": plain_step(build(PLAIN), images, target),
        "literal, TAP and ADL": literal,
    }
    apart = difference(calls["saccade, TAP and ADL"], literal)
    title = f"FAN-S-Hybrid, training step, 8 images of 224 px (logits and loss differ by {apart:.1e} of the largest)"
    return compare(title, calls, work=8, unit="images", repeats=3, warmup=0, cpu_time=True) | {"difference": apart}


def memory_case() -> dict[str, object]:
    """Measure the peak memory of a training step of one image of 1024 pixels."""
    images, target = torch.randn(1, 3, 1024, 1024), torch.arange(1)

    def peaks(depth: int) -> dict[str, float]:
        model = build(POOLED, depth=depth)
        steps = {
            "saccade": diverse_step(model, images, target),
            "literal": literal_step(LiteralFAN(model), images, target),
        }
        return {name: peak_memory(step) / GIB for name, step in steps.items()}

    one, two = peaks(1), peaks(2)
    whole = {name: one[name] + (DEPTH - 1) * (two[name] - one[name]) for name in one}
    ours = peak_memory(diverse_step(build(POOLED), images, target)) / GIB
    print("FAN-S-Hybrid with TAP and ADL, training step, 1 image of 1024 px, peak memory")
    for name in one:
        line = f"{whole[name]:>7.2f} with {DEPTH} (line)"
        print(f"  {name:<10}{one[name]:>7.2f} GiB with 1 block{two[name]:>7.2f} with 2{line}")
    ratio = ours / whole["literal"]
    print(f"  saccade   {ours:>7.2f} GiB with {DEPTH} blocks, measured: {ratio:.2f} of the literal form")
    return {
        "case": "FAN-S-Hybrid, TAP and ADL, training step, 1 image of 1024 px, peak GiB",
        "one_block": one,
        "two_blocks": two,
        "line_to_ten_blocks": whole,
        "saccade_ten_blocks_measured": ours,
        "saccade_over_literal": ratio,
    }


def inference_case() -> dict[str, object]:
    """Time 4 images beside models of the same size."""
    images = torch.randn(4, 3, 224, 224)
    calls = {}
    for name in (POOLED, PLAIN, *PEERS):
        model = timm.create_model(name).eval()

        def call(model: nn.Module = model) -> Tensor:
            with torch.inference_mode():
                return model(images)

        calls[f"{name} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M)"] = call
    work = {name: multiply_adds(name) for name in (POOLED, PLAIN, *PEERS)}
    print("  " + "   ".join(f"{name}: {value:.1f} G multiply-adds" for name, value in work.items()))
    result = compare("inference, 4 images of 224 px", calls, work=4, unit="images", repeats=5, cpu_time=True)
    return result | {"giga_multiply_adds_per_image": work}


def multiply_adds(name: str) -> float:
    """Count the multiply-adds of one image of 224 pixels, in units of 1e9."""
    with torch.device("meta"):
        model, image = timm.create_model(name).eval(), torch.empty(1, 3, 224, 224)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() / 2e9


def main() -> None:
    """Run, and save after each case."""
    torch.set_num_threads(1)
    cases = []
    for case in (training_case, inference_case, memory_case):
        cases.append(case())
        save("robust", cases)  # a run that is cut off leaves what it has measured


if __name__ == "__main__":
    main()
