"""Golden runner of the distance profile of attention maps."""

from saccade.vision_backbones.analysis import attention_profile
from tests.golden.case import Case
from tests.golden.runners import runner


@runner("robust.attention_profile")
def profile(case: Case) -> None:
    """Figures of each head, averaged over the batch."""
    rows, columns = case.entry["grid"]
    found = attention_profile(case.tensors["input.attn"], (rows, columns), prefix_tokens=case.entry["prefix_tokens"])
    names = [name.removeprefix("output.") for name in case.expected()]
    case.compare({f"output.{name}": getattr(found, name).mean(0) for name in names})
