"""What the sub-commands of ``saccade vlm`` share: the model, the intervention, how answers are written."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from saccade.apps.options import comma_list
from saccade.errors import ConfigError

if TYPE_CHECKING:
    from saccade.vlm import AnswerPlan, LoadedVLM
    from saccade.vlm.answering import GenerationOptions

__all__ = [
    "add_generation_options",
    "add_intervention_options",
    "add_vlm_model_options",
    "answer_plan",
    "generation_options",
    "load_model",
    "no_loading_bars",
    "number_list",
    "settings_of",
]


def add_vlm_model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``-m`` and what goes with it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", required=required, metavar="NAME", help="local-dir:PATH (save_pretrained) or hf-hub:ORG/NAME"
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model brings (read it first)"
    )


def add_intervention_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--intervention``, ``--preset`` and ``--set``."""
    group = parser.add_argument_group("intervention")
    group.add_argument("--intervention", metavar="NAME", help="act, gift, pai, vaf, var or vhr (default: none)")
    group.add_argument("--preset", choices=["paper", "released_code"], default="paper", help="default: paper")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of it, repeatable: tau=25, layers=[2,3,4]",
    )


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of Hugging Face's ``generate`` that matter here."""
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="F", help="default: 0, the likeliest token")
    group.add_argument("--top-p", type=float, default=1.0, metavar="F", help="of sampling (default: 1)")
    group.add_argument("--num-beams", type=int, default=1, metavar="N", help="default: 1")


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """Collect the parsed options of answers."""
    from saccade.vlm.answering import GenerationOptions

    return GenerationOptions(args.max_new_tokens, args.temperature, args.top_p, args.num_beams)


def answer_plan(args: argparse.Namespace) -> AnswerPlan:
    """Collect all that answers depend on from the parsed options."""
    from saccade.vlm import AnswerPlan

    return AnswerPlan(
        args.model,
        args.intervention,
        settings_of(args.set),
        args.preset,
        generation_options(args),
        args.trust_remote_code,
        args.seed,
    )


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """Parse ``["tau=25", "layers=[2,3]"]``; values are JSON, or else text.

    Raises:
        ConfigError: If one has no ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set needs KEY=VALUE, e.g. --set tau=25; got {pair!r}.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[key.strip()] = tuple(value) if isinstance(value, list) else value
    return found


def number_list(text: str) -> tuple[int, ...]:
    """Parse ``"10,11,12"``."""
    return tuple(int(part) for part in comma_list(text))


def no_loading_bars() -> None:
    """Keep transformers from drawing a progress bar while it reads weights."""
    import transformers

    screen: Any = transformers.utils.logging
    screen.disable_progress_bar()


def load_model(args: argparse.Namespace) -> LoadedVLM:
    """Load the model that the options name, on the device and in the precision that they ask for."""
    from saccade.batch import resolve_device, resolve_precision
    from saccade.vlm import load_vlm

    no_loading_bars()
    device = resolve_device(args.device)
    dtype = resolve_precision(args.precision, device)
    return load_vlm(args.model, device=str(device), dtype=dtype, trust_remote_code=args.trust_remote_code)
