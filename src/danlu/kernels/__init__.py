"""Compiled steps and functions behind the reference implementations: C++ on the CPU, Triton on CUDA devices.

Nothing is compiled or imported before it is asked for. Compiled C++ is kept in `$DANLU_KERNELS`, or in the user's cache
folder, under the hash of its source, compiler and processor.
"""

from danlu.kernels._availability import Kernel, explain, status

__all__ = ["Kernel", "explain", "status"]
