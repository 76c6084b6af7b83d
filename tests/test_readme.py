"""Everything that the README shows is run."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_session():
    runner = doctest.DocTestRunner()
    for number, block in enumerate(blocks("python")):
        test = doctest.DocTestParser().get_doctest(block, {}, f"README block {number}", "README.md", 0)
        assert test.examples
        assert runner.run(test).failed == 0


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert [line.split()[2] for line in blocks("console")[0].splitlines()] == ["demo", "test"]
    assert {"demo", "test"} <= set(targets)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_terminal_session(tmp_path):
    """The demo, which `make demo` runs, and then the commands of the README on what it left."""
    lines = ["$ saccade demo -o demo/", *blocks("console")[1].splitlines()]
    scripts = Path(sys.executable).parent
    for line in lines:
        command, _, comment = line.removeprefix("$ ").partition("#")
        expected = int(re.search(r"exit (\d)", comment)[1]) if "exit" in comment else 0
        environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, f"{line}\n{done.stdout}\n{done.stderr}"
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 9
    report = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    for picture in re.findall(r'<img[^>]* src="([^"]+)"', report):
        assert (tmp_path / "demo" / picture).exists(), picture
    accuracy = float(re.search(r"not seen in training: (\d\.\d+)", report)[1])
    assert accuracy > 0.7
