"""Compile every shipped kernel for sm_80 and sm_90 without a GPU; prints one JSON row per build.

Runs in its own process, without the interpreter: ``python -m tests.attention.aot [FILE ...]``, FILE being a name in
``saccade/attention/kernels`` without ``.py``; all of them if none is given.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import saccade.attention.kernels as kernels
from saccade.attention.kernels.runtime import Build

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(build: Build) -> ASTSource:
    """Declare pointers 16-byte aligned, and integers written ``i32:16`` as multiples of 16, as the launcher would."""
    names = build.kernel.arg_names
    signature = {n: build.signature[n].partition(":")[0] if n in build.signature else "constexpr" for n in names}
    aligned = {n for n, kind in build.signature.items() if kind.startswith("*") or kind.endswith(":16")}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    return ASTSource(build.kernel, signature, dict(build.constants), attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers and stack per thread and static shared memory, as the driver's tool reads them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    return {name: int(re.search(rf"{name}:(\d+)", text.stdout)[1]) for name in ("REG", "STACK", "SHARED")}


def compile_build(build: Build, capability: int) -> dict[str, object]:
    """Compile one build and return what it uses."""
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source(build), target=GPUTarget("cuda", capability, 32), options=options)
    used = resources(compiled.asm["cubin"])
    return {
        "registers": used["REG"],
        "spill_bytes": used["STACK"],
        "shared": compiled.metadata.shared,
        "tensor_cores": bool(re.search(r"wgmma\.|mma\.sync", compiled.asm["ptx"])),
    }


def main() -> None:
    """Compile the files named on the command line, or all."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    found = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.name != "runtime"]
    for name in sys.argv[1:] or found:
        for build in importlib.import_module(f"saccade.attention.kernels.{name}").BUILDS:
            constants = {key: value for key, value in build.constants.items() if value is not None}
            row = {"file": name, "kernel": build.kernel.__name__, "constants": constants, "allowed": build.spill_bytes}
            types = sorted(set(build.signature.values()))
            for capability in (80, 90):
                result = compile_build(build, capability)
                print(json.dumps({**row, "types": types, "sm": capability, **result}), flush=True)


if __name__ == "__main__":
    main()
