"""Which compiled step runs where, what is said when none does, and what is kept on disk."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from danlu import kernels
from danlu.kernels import _cpp
from danlu.optim import Lion, _traversal


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one: nothing compiled is found, nothing can be compiled."""
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    _cpp._library.cache_clear()
    _traversal._SAID.clear()
    yield
    _cpp._library.cache_clear()


def stepped(**options):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    Lion([p], lr=0.1, **options).step()
    return p.detach()


def test_reasons():
    p = torch.ones(2)
    assert kernels.explain("sign_update", p) is None
    assert "dtype torch.complex64" in kernels.explain("sign_update", p.to(torch.complex64))
    assert "layout" in kernels.explain("sign_update", p.to_sparse())
    assert "different devices" in kernels.explain("sign_update", p, torch.empty(2, device="meta"))
    assert "no kernel for device 'meta'" in kernels.explain("sign_update", torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="name must be one of 'amos', 'entmax', 'linear_rows'"):
        kernels.explain("sing_update", p)


def test_status_names_every_kernel_and_device():
    found = kernels.status()
    assert found["sign_update (cpu)"] == "ready"
    cpp = {f"{name} (cpu)" for name in ("amos", "entmax", "sign_update", "soft_topk", "squareplus", "step_size")}
    triton = {f"{name} (cuda)" for name in ("entmax", "linear_rows", "sign_update")}
    assert set(found) == cpp | triton


def test_without_a_compiler_the_step_falls_back_and_says_so_once(no_compiler):
    assert "no C++ compiler" in kernels.status()["sign_update (cpu)"]
    with pytest.warns(UserWarning, match="'sign_update' is not available, a slower one is used.*no C\\+\\+ compiler"):
        first = stepped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(first, stepped())
        assert torch.equal(first, stepped(fused=False))
    assert torch.equal(first, torch.full((3,), 0.9))
    with pytest.raises(RuntimeError, match=r"fused=True, but the kernel cannot run .*no C\+\+ compiler"):
        stepped(fused=True)


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho "boom: line 1" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("DANLU_KERNELS", str(tmp_path / "kernels"))
    _cpp._library.cache_clear()
    try:
        assert "could not compile sign_update.cpp: boom: line 1" in kernels.explain("sign_update", torch.ones(1))
        assert list((tmp_path / "kernels").iterdir()) == []
    finally:
        _cpp._library.cache_clear()


def test_a_folder_that_others_can_write_to_is_refused(monkeypatch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("DANLU_KERNELS", str(tmp_path))
    _cpp._library.cache_clear()
    try:
        assert "can be written by others" in kernels.explain("sign_update", torch.ones(1))
    finally:
        _cpp._library.cache_clear()


def test_two_processes_compile_at_once_and_a_third_finds_the_result(tmp_path):
    code = "import torch; from danlu import kernels; print(kernels.explain('sign_update', torch.ones(1)))"
    environment = {**os.environ, "DANLU_KERNELS": str(tmp_path / "kernels")}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["None", "None"]
    (built,) = (tmp_path / "kernels").iterdir()
    before = built.stat().st_mtime_ns
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert built.stat().st_mtime_ns == before
