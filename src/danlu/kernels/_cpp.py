"""Compiling the C++ sources with the machine's compiler, once, and loading them with ctypes.

The sources have a plain C interface and no dependency, so a compilation takes seconds and needs neither the headers of
torch nor a build system.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["CompilerError", "library", "reason"]

_SOURCES = Path(__file__).parent / "cpu"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-shared",
    "-fPIC",
    "-pthread",
)


class CompilerError(RuntimeError):
    """There is no compiler, or it does not accept the source."""


def reason(name: str) -> str | None:
    """Why the kernel `name` cannot run on this CPU; None if it can."""
    try:
        library(name)
    except CompilerError as error:
        return str(error)
    return None


def library(name: str) -> ctypes.CDLL:
    """The compiled source `cpu/<name>.cpp`; raise `CompilerError` that says why there is none."""
    found = _library(name)
    if isinstance(found, str):
        raise CompilerError(found)
    return found


@cache
def _library(name: str) -> ctypes.CDLL | str:
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    try:
        target = _folder() / f"{name}-{_identity(name, compiler)}.so"
        if not target.exists():
            _compile(compiler, _SOURCES / f"{name}.cpp", target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        detail = output.strip().splitlines()[0] if isinstance(output, str) and output.strip() else str(error)
        return f"{compiler} could not compile {name}.cpp: {detail}"


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    if wanted is not None:
        return shutil.which(wanted)
    return next((found for one in ("c++", "g++", "clang++") if (found := shutil.which(one))), None)


def _folder() -> Path:
    chosen = os.environ.get("DANLU_KERNELS")
    cache_home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen) if chosen else Path(cache_home or Path.home() / ".cache") / "danlu" / "kernels"
    # Code is loaded from here: nobody else may write into it.
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others; set DANLU_KERNELS to a folder of your own")
    return folder


def _identity(name: str, compiler: str) -> str:
    """Hash of everything that decides the machine code."""
    total = hashlib.sha256()
    for source in (_SOURCES / "common.h", _SOURCES / f"{name}.cpp"):
        total.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    total.update("\0".join((version, *_FLAGS, platform.machine(), _processor())).encode())
    return total.hexdigest()[:20]


def _processor() -> str:
    """The features of the processor: code for this one may not run on the next."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: str, source: Path, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    command = [compiler, *_FLAGS, str(source), "-o", temporary]
    try:
        # Not every compiler knows the processor by this flag; without it the code is portable and slower.
        done = subprocess.run([*command, "-march=native"], capture_output=True, text=True, check=False)
        if done.returncode:
            subprocess.run(command, capture_output=True, text=True, check=True)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
