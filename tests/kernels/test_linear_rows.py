"""The Triton passes over a chunk of logits: equal to autograd under the interpreter, and compilable for a GPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from danlu.kernels.linear_rows import row_statistics, write_row_gradients

SCRIPT = Path(__file__).parent / "linear_rows_script.py"
CHECKS = re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """The interpreter must be chosen before Triton is imported, hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results, check):
    assert results[check] == "passed", results[check]


COMPILE = """
import json
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from danlu.kernels import _linear_rows_triton as kernels

integers = {"stride": "i32", "cost_stride": "i32", "out_stride": "i32", "classes": "i32", "cap": "fp32"}
types = integers | {"target": "*i64", "best": "*i64", "keep": "*u8"}
found = {}
for name, dtype in {"_statistics": "*fp32", "_gradient": "*bf16"}.items():
    kernel = getattr(kernels, name)
    constants = {"F": tl.float32, "CAPPED": True, "COSTS": True, "BLOCK": kernels.BLOCK}
    names = kernel.arg_names
    wide = {"logits": dtype, "costs": dtype, "out": dtype}
    signature = {n: "constexpr" if n in constants else {**wide, **types}.get(n, "*fp32") for n in names}
    source = ASTSource(kernel, signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    made = compile(source, target=GPUTarget("cuda", 90, 32))
    found[name] = len(made.asm["cubin"]) > 0
print(json.dumps(found))
"""


@needs_triton
def test_kernels_compile_for_a_hopper_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment, timeout=240
    )
    if done.returncode and "ptxas" in done.stderr:
        pytest.skip("Triton came without its assembler")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {"_statistics": True, "_gradient": True}


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_on_the_gpu(check):
    """The checks of the script, with its tensors made on the device."""
    spec = importlib.util.spec_from_file_location("linear_rows_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with torch.device("cuda"):
        script.CHECKS[check]()


@needs_triton
@pytest.mark.parametrize(
    ("logits", "costs", "error"),
    [
        (torch.zeros(3), None, ValueError),
        (torch.zeros(4, 3).t(), None, ValueError),
        (torch.zeros(3, 4), torch.zeros(3, 5), ValueError),
        (torch.zeros(3, 4, dtype=torch.int64), None, TypeError),
    ],
)
def test_what_does_not_fit_is_refused(logits, costs, error):
    with pytest.raises(error, match=r"logits|costs"):
        row_statistics(logits, torch.zeros(3, dtype=torch.int64), costs=costs)


def test_a_result_elsewhere_must_have_the_shape():
    logits = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="out must have shape"):
        write_row_gradients(logits, None, None, None, None, out=torch.zeros(3, 5))
