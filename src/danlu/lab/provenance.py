"""Where a row comes from: code, commit, versions, hardware. None of it is personal: no host, user or path."""

import hashlib
import importlib
import importlib.metadata
import inspect
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

import danlu
from danlu.lab.trial import Scalar, Trial

__all__ = ["code_version", "environment", "method_sources"]

# What only displays or transports results cannot change them.
_NOT_CODE = ("cli.py", "report.py", "outcome.py", "progress.py", "stats.py", "store.py", "errors.py")


@cache
def code_version() -> str:
    """Hash of the package's sources that can influence a fit, and of torch's version.

    The declarations of trials are left out: what they say reaches a fit as options, which are hashed with it.
    """
    root = Path(danlu.__file__).parent
    total = hashlib.sha256(torch.__version__.encode())
    for path in sorted(root.rglob("*")):
        if path.suffix not in (".py", ".cpp", ".h"):
            continue
        relative = path.relative_to(root).as_posix()
        if relative.startswith("lab/trials/") or (relative.startswith("lab/") and path.name in _NOT_CODE):
            continue
        total.update(relative.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:20]


@cache
def environment() -> dict[str, Scalar]:
    """Versions, hardware, commit and whether the working tree has local changes."""
    commit, dirty = _git_state()
    names = ("torch", "numpy", "scipy", "scikit-learn")
    versions: dict[str, Scalar] = {name: _version(name) for name in names}
    return {
        "danlu": danlu.__version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        **versions,
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_state() -> tuple[str, bool]:
    """Commit and dirty flag of the checkout that holds the package; an installed package is clean by definition."""
    root = Path(danlu.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return f"release {danlu.__version__}", False
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "src"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return commit.stdout.strip(), bool(status.stdout.strip())


def _processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def method_sources(trial: Trial) -> dict[str, str]:
    """Source text of the methods that the trial's arms name."""
    sources: dict[str, str] = {}
    for arm in trial.arms.values():
        if not arm.method:
            continue
        module, _, name = arm.method.rpartition(".")
        target = getattr(importlib.import_module(module), name)
        sources[arm.method] = inspect.getsource(inspect.getmodule(target) or target)
    return sources
