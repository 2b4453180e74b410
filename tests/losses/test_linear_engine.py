"""The engine with the Triton passes in place of operations of PyTorch, under Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from danlu.losses import EMO, CrossEntropy
from danlu.losses._linear_engine import Batch, Plan, _has_kernel

SCRIPT = Path(__file__).parent / "linear_rows_engine_script.py"
CASES = [
    f"{loss}-{kind}"
    for loss in ("cross_entropy", "tailr", "generalized", "emo", "emo_copy")
    for kind in ("plain", "softcap", "margin")
]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """The interpreter must be chosen before Triton is imported, hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize("case", CASES)
def test_equals_operations_of_pytorch(results, case):
    assert results[case] == "passed", results[case]
    assert results.keys() == set(CASES)


def test_what_the_kernel_does_not_do(monkeypatch):
    """A cap with a shift, a table of costs, a callable, and the CPU."""
    monkeypatch.setattr("danlu.losses._linear_engine.explain", lambda *_: None)
    rows = torch.zeros(2, device="meta")
    logits, batch = torch.zeros(2, 3, device="meta"), Batch(rows, rows, rows, None)

    def runs(loss, shift=None, softcap=None) -> bool:
        plan = Plan(loss, 2, torch.float32, softcap=softcap)
        return _has_kernel(logits, batch._replace(shift=shift), plan)

    assert runs(CrossEntropy())
    assert runs(CrossEntropy(), softcap=2.0)
    assert runs(CrossEntropy(), shift=rows)
    assert not runs(CrossEntropy(), shift=rows, softcap=2.0)
    assert runs(EMO(cost_embedding="head"))
    assert not runs(EMO(cost_matrix=torch.eye(3)))
    assert not runs(torch.nn.functional.cross_entropy)
    assert not _has_kernel(torch.zeros(2, 3), batch, Plan(CrossEntropy(), 2, torch.float32))
