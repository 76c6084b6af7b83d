"""Whole answers under interventions beside plain decoding: 640 tokens of prompt, 576 of them an image, 64 new tokens.

A LLaVA with random weights, one thread, float32, greedy with the end of text ignored. Times are CPU seconds of the
process, medians of alternating calls, so that other work on the machine counts little. `literal` is VAR as it was
published, with every attention map in memory and a loop over heads; its logits are compared with ours first.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import save
from benchmarks.literal_var import literal_var
from saccade.apps.measure import MIB, peak_memory
from saccade.vlm import GIFT, VAR, VHR, intervene

SIZES = {
    "29 M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "101 M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
IMAGE = (8, 584)  # places of the image tokens
PROMPT, NEW = 640, 64
REPEATS = 5


def model_of(size: dict[str, int]) -> Any:  # noqa: ANN401
    """Return a model with random weights: a tiny vision tower before a decoder of some size."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(vocab_size=8000, max_position_embeddings=1024, **size)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=7999, vision_feature_layer=-1)
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def cases() -> Iterator[dict[str, object]]:
    """Measure every method on every size."""
    for name, size in SIZES.items():
        model = model_of(size)
        ids = torch.randint(10, 7000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        ids[:, slice(*IMAGE)] = 7999
        inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}
        words = torch.zeros(1, PROMPT, dtype=torch.bool)
        words[:, 600:616:2] = True
        layers = size["num_hidden_layers"]
        var = VAR(sink_channels=(10, 200), tau=2.5, min_nonsink_share=0.5, min_visual_mass=0.2)
        middle = tuple(range(layers // 3 + 1, 2 * layers // 3))
        methods: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "plain": nullcontext,
            "VAR": lambda model=model, var=var: intervene(model, var),
            "GIFT": lambda model=model, middle=middle, layers=layers, words=words: intervene(
                model, GIFT((layers // 3,), middle, 5.0, content_tokens=words)
            ),
            "GIFT, map from above": lambda model=model, layers=layers, words=words: intervene(
                model, GIFT((layers // 2,), tuple(range(2, layers // 2 + 2)), 4.0, content_tokens=words)
            ),
            "VHR": lambda model=model: intervene(model, VHR()),
            "VAR, literal": lambda model=model, var=var: literal_var(model, var, *IMAGE),
        }
        parameters = sum(p.numel() for p in model.model.language_model.parameters()) / 1e6
        yield compared(name, parameters, model, inputs, methods)


@torch.inference_mode()
def compared(
    name: str,
    parameters: float,
    model: Any,  # noqa: ANN401
    inputs: dict[str, Tensor],
    methods: dict[str, Callable[[], AbstractContextManager[Any]]],
) -> dict[str, object]:
    """Time whole answers under every method in turn."""

    def answer(method: str) -> Any:  # noqa: ANN401
        with methods[method]():
            return model.generate(
                **inputs,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )

    logits = {method: answer(method).logits[0] for method in methods}  # warms up, too
    size = logits["VAR"].abs().max()
    difference = float((logits["VAR"] - logits["VAR, literal"]).abs().max() / size)
    effect = float((logits["VAR"] - logits["plain"]).abs().max() / size)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(REPEATS):
        for method in methods:
            start = time.process_time()
            answer(method)
            seconds[method].append(time.process_time() - start)
    print(
        f"decoder of {parameters:.0f} M, {PROMPT} + {NEW} tokens; VAR differs from its literal form by {difference:.1e}"
    )
    print(f"  of the largest logit, from plain decoding by {effect:.1e}")
    rows = {}
    memory = {method: peak_memory(lambda method=method: answer(method)) / MIB for method in methods}
    for method, times in seconds.items():
        median = statistics.median(times)
        ratios = [own / plain for own, plain in zip(times, seconds["plain"], strict=True)]
        rows[method] = {
            "cpu_seconds": round(median, 3),
            "time_over_plain": round(statistics.median(ratios), 3),
            "least_and_largest_ratio": [round(min(ratios), 3), round(max(ratios), 3)],
            "peak_mib": round(memory[method], 1),
            "memory_over_plain": round(memory[method] / memory["plain"], 3),
        }
        print(
            f"  {method:<24}{median:>8.2f} s   {rows[method]['time_over_plain']:.2f} x plain "
            f"({min(ratios):.2f} to {max(ratios):.2f})   {memory[method]:>7.1f} MiB   "
            f"{rows[method]['memory_over_plain']:.2f} x"
        )
    return {"case": name, "difference": difference, "effect": effect, "rows": rows}


def main() -> None:
    """Run the benchmark."""
    torch.set_num_threads(1)
    done = []
    for case in cases():
        done.append(case)
        save("vlm", done)  # what is measured stays if the next case is cut off
