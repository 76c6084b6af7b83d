"""The models of ``saccade list mil``, known without importing torch; a test compares them with what is registered."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AGGREGATORS", "Aggregator"]


@dataclass(frozen=True)
class Aggregator:
    """One line of the list.

    Args:
        name: For ``slides train --model``.
        attention: What its attention is.
        tasks: What it learns.
        source: Paper and venue.
        checkpoints: Repositories whose weights ``slides predict`` and ``convert`` read; empty if there are none.
        verified: What tests compare with the official code: ``golden`` outputs, ``grad`` gradients, ``keys`` checkpoint
            keys.
    """

    name: str
    attention: str
    tasks: str
    source: str
    checkpoints: str = ""
    verified: str = ""


ANY, CLASSES = "classes, values, survival", "classes"
AGGREGATORS = (
    Aggregator("abmil", "gated or plain", ANY, "Ilse et al., ICML 2018", "ACMIL, MIL-Lab", "golden, grad, keys"),
    Aggregator("acmil_ga", "gated, M branches", ANY, "ACMIL, ECCV 2024", "ACMIL", "golden, grad, keys"),
    Aggregator("acmil_mha", "multi-head, M branches", ANY, "ACMIL, ECCV 2024", "ACMIL", "golden, grad, keys"),
    Aggregator("clam_mb", "gated, a row for each class", CLASSES, "CLAM, Nature BME 2021", "CLAM", "keys"),
    Aggregator("clam_sb", "gated", CLASSES, "CLAM, Nature BME 2021", "CLAM", "golden, grad, keys"),
    Aggregator("dsmil", "to each class's critical tile", CLASSES, "DSMIL, CVPR 2021", "DSMIL", "golden, grad, keys"),
    Aggregator("max", "none", ANY, "maximum of tile logits"),
    Aggregator("mean", "none", ANY, "mean of tile logits"),
    Aggregator("transmil", "Nystrom, M landmarks", ANY, "TransMIL, NeurIPS 2021", "TransMIL", "golden, grad, keys"),
)
