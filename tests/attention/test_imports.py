"""What an import loads: nothing for the package, torch alone for the core."""

import subprocess
import sys

LIST_MODULES = "import sys; before = set(sys.modules); import {}; print(*sorted(set(sys.modules) - before))"


def loaded(module, setup="pass"):
    """Names of the modules that importing ``module`` adds in a fresh interpreter after ``setup``."""
    code = f"{setup}; {LIST_MODULES.format(module)}"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_the_package_imports_no_torch():
    roots = {name.partition(".")[0] for name in loaded("saccade")}
    assert roots.isdisjoint({"torch", "timm", "lightning", "numpy", "triton"})


def test_the_core_adds_nothing_to_torch_but_itself():
    added = loaded("saccade.attention", setup="import torch")
    assert [name for name in added if not name.startswith("saccade.attention")] == ["saccade", "saccade.errors"]
