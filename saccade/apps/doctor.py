"""``saccade doctor``: check this installation."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from saccade.apps import checks
from saccade.apps.checks import Result

__all__ = ["EXAMPLES", "PROFILES", "Check", "Finding", "add_arguments", "examine", "run"]

EXAMPLES = {
    "doctor": [
        "saccade doctor",
        "saccade doctor --profile all --json",
    ]
}


@dataclass(frozen=True)
class Check:
    """One entry of a profile.

    Args:
        name: Stable word for ``--json``.
        function: Does the work in an empty folder.
        packages: What to install if an import fails.
        optional: A missing package is a warning: only some output formats need it.
    """

    name: str
    function: Callable[[Path], Result]
    packages: str = "saccade"
    optional: bool = False


@dataclass(frozen=True)
class Finding:
    """One line of the report; its fields are the keys of ``--json``."""

    name: str
    status: str
    message: str
    fix: str
    seconds: float


OPENCV = Check("opencv", checks.check_opencv, "opencv-python-headless")
BASE = (
    Check("versions", checks.check_versions, "packaging"),
    Check("accelerator", checks.check_accelerator, "torch"),
    Check("attention", checks.check_attention, "torch"),
    Check("model", checks.check_model, "timm"),
    Check("images", checks.check_images, "pillow numpy"),
    Check("workers", checks.check_workers, "torch"),
    Check("tables", checks.check_tables),
    Check("parquet", checks.check_parquet, "'saccade[parquet]'", optional=True),
    Check("arrays", checks.check_arrays, "h5py numpy"),
    Check("zarr", checks.check_zarr, "'saccade[zarr]'", optional=True),
    Check("plots", checks.check_plots, "matplotlib pillow"),
    Check("disk", checks.check_disk),
    Check("encoding", checks.check_encoding),
)
EXTRA = {
    "wsi": (
        Check("openslide", checks.check_openslide, "openslide-python openslide-bin tifffile"),
        Check("tiff", checks.check_tiff, "tifffile imagecodecs"),
        OPENCV,
    ),
    "gaze": (Check("clustering", checks.check_clustering, "scikit-learn"), OPENCV),
    "vlm": (
        Check("transformers", checks.check_transformers, "transformers"),
        Check("open_clip", checks.check_open_clip, "open_clip_torch"),
    ),
    "dev": (
        Check("tools", checks.check_tools, "'saccade[dev]'"),
        Check("parquet", checks.check_parquet, "'saccade[dev]'"),  # its tests write them
        Check("zarr", checks.check_zarr, "'saccade[dev]'"),
    ),
}


def profile_checks(*extras: str) -> tuple[Check, ...]:
    """Return the basic checks and those of the extras; the later entry of a name replaces the earlier."""
    chosen = {check.name: check for check in BASE}
    for extra in extras:
        chosen |= {check.name: check for check in EXTRA[extra]}
    return tuple(chosen.values())


PROFILES = {"base": BASE, **{name: profile_checks(name) for name in EXTRA}, "all": profile_checks(*EXTRA)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--profile", choices=list(PROFILES), default="base", help="what to check for (default: base)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    findings = []
    if not args.json:
        print(f"saccade doctor   profile {args.profile}")
    for finding in examine(PROFILES[args.profile]):
        findings.append(finding)
        if not args.json:
            fix = f"     fix: {finding.fix}" if finding.fix else ""
            print(f"{finding.status}  {finding.message}{fix}", flush=True)
    counts = {status: sum(finding.status == status for finding in findings) for status in ("PASS", "WARN", "FAIL")}
    if args.json:
        report = {"profile": args.profile, "checks": [asdict(finding) for finding in findings]}
        totals = {"passed": counts["PASS"], "warnings": counts["WARN"], "failed": counts["FAIL"]}
        print(json.dumps(report | totals, indent=1, ensure_ascii=False))
    else:
        plural = "" if counts["WARN"] == 1 else "s"
        print(f"{counts['PASS']} passed, {counts['WARN']} warning{plural}, {counts['FAIL']} failed")
    return 1 if counts["FAIL"] else 0


def examine(profile: tuple[Check, ...]) -> Iterator[Finding]:
    """Run checks one after the other; one that raises has failed.

    Args:
        profile: Entries of ``PROFILES``, or any others.

    Yields:
        One finding per check, when it is done.
    """
    for check in profile:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="saccade-doctor-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library warns of is not what is asked here
            try:
                result = check.function(Path(folder))
            except ImportError as error:
                status = "WARN" if check.optional else "FAIL"
                result = Result(status, f"{check.name}: {error}", f"pip install {check.packages}")
            except Exception as error:  # the report is where every failure of a check is told
                fix = f"pip install --upgrade {check.packages}; then run saccade doctor again"
                result = Result("FAIL", f"{check.name}: {type(error).__name__}: {error}", fix)
        yield Finding(check.name, result.status, result.message, result.fix, round(time.monotonic() - start, 3))
