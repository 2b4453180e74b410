"""The Triton rows of entmax: equal to the reference under the interpreter, and compilable for an absent GPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "entmax_triton_script.py"
CHECKS = re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    # The interpreter is chosen when the kernels are defined: in a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] == "passed", results[check]


COMPILE = """
import json
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from danlu.kernels import _entmax_triton as kernels

found = []
numbers = {"BETA": 0.25, "TOLERANCE": 1e-7, "LARGEST": 3e38, "STEPS": 60}
for name, flags in {"_forward": numbers, "_vjp": {"EXPONENT": 0.75}}.items():
    for kind in (0, 1, 2):
        kernel = getattr(kernels, name)
        constants = {"F": tl.float32, "KIND": kind, "BLOCK": 1024, **flags}
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else {"n": "i32"}.get(n, "*bf16") for n in names}
        source = ASTSource(kernel, signature, constexprs={(names.index(n),): v for n, v in constants.items()})
        found.append(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 0)
print(json.dumps(found))
"""


def test_kernels_compile_for_a_hopper_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment, timeout=240
    )
    if done.returncode and "ptxas" in done.stderr:
        pytest.skip("Triton came without its assembler")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [True] * 6
