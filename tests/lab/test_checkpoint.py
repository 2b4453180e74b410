"""State goes to a file and back bit for bit, and a file is there whole or not at all."""

import math
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from danlu.lab.checkpoint import load_state, save_state, write_atomically
from danlu.lab.errors import StoreError


def test_round_trip(tmp_path):
    shared = torch.randn(3, 4)
    state = {
        "tensors": [shared, shared.t(), torch.tensor(3.5, dtype=torch.bfloat16), torch.zeros(0, 2), torch.tensor(True)],
        7: {"betas": (0.9, 0.99), "none": None, "flag": True, "name": "Größe", "inf": math.inf, "tiny": 5e-324},
        "empty": [{}, (), []],
    }
    path = tmp_path / "state.safetensors"
    save_state(path, state)
    loaded = load_state(path)
    for first, second in zip(state["tensors"], loaded["tensors"], strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    assert loaded[7] == state[7]
    assert isinstance(loaded[7]["betas"], tuple)
    assert loaded["empty"] == state["empty"]
    assert isinstance(loaded["empty"][1], tuple)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_optimizer_state_round_trip(tmp_path, name):
    model = torch.nn.Linear(3, 2)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "o", optimizer.state_dict())
    loaded = load_state(tmp_path / "o")
    assert str(loaded) == str(optimizer.state_dict())


def test_only_tensors_and_plain_data(tmp_path):
    with pytest.raises(TypeError, match="not object"):
        save_state(tmp_path / "x", {"a": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04}."])
def test_unreadable_file(tmp_path, content):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="cannot read the saved state"):
        load_state(path)


def test_foreign_and_missing_file(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for name in ("foreign", "missing"):
        with pytest.raises(StoreError, match=name):
            load_state(tmp_path / name)


def test_failed_write_leaves_the_old_file(tmp_path):
    """A real write error: the process may not make files larger than 100 bytes."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import sys; from pathlib import Path; from danlu.lab.checkpoint import write_atomically;"
        "write_atomically(Path(sys.argv[1]), b'x' * 1000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "StoreError: cannot write" in done.stderr
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot write .*file/inside"):
        write_atomically(tmp_path / "file" / "inside", b"")
