r"""Which implementation of rotary attention runs, and why.

Shape letters: as in `danlu.attention._rerope`.
"""

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from danlu._common.checks import check_choice
from danlu.attention._band_calls import Masks, jobs
from danlu.attention._band_cuda import why_not
from danlu.attention._band_kernels import kernel_of
from danlu.attention._masks import check_attention

__all__ = ["Backend", "BackendChoice", "check_backend", "explain_backend", "in_bands"]

Backend = Literal["auto", "banded", "reference"]

# From so many scores of a head on, flash kernels are faster than the dense definition (measured on a CPU).
_FLASH_FROM = 2**16
# Without a flash kernel tiles save memory and cost time, so they wait until all scores are 0.5 GiB in float32.
_TILES_FROM = 2**27


class BackendChoice(NamedTuple):
    """What [`explain_backend`][danlu.attention.explain_backend] returns.

    Definition:
        The pair (`backend`, `reason`).

    Args:
        backend: "banded" or "reference".
        reason: a sentence.

    Numerics:
        None.

    Source:
        Our own.

    Example:
        >>> from danlu.attention import BackendChoice
        >>> BackendChoice("reference", "it was asked for").backend
        'reference'
    """

    backend: Literal["banded", "reference"]
    reason: str


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    attn_mask: Tensor | None = None,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> BackendChoice:
    r"""What `rope_attention` and `rerope_attention` would run for these arguments, without running it.

    Definition:
        "reference" is the dense definition with all scores in memory. "banded" never holds them: flash kernels on bands
        of near and far keys, on the CPU and, for half precision, on CUDA; tiles of 64 rows where masks have gaps, with
        a kernel on the CPU and in plain PyTorch elsewhere. "auto" takes "banded" from $MN = 2^{16}$ on where there are
        flash kernels, and from $BHMN = 2^{27}$ on elsewhere, so that the memory is bounded everywhere; it warns where
        an `attn_mask` needs a gradient or weights are dropped, which only "reference" can.

    Args:
        query: as in the functions, shape `(B, H, M, D)`.
        key: shape `(B, H_kv, N, D)`.
        value: shape `(B, H_kv, N, E)`.
        key_padding_mask: as in the functions.
        cu_seqlens: as in the functions.
        attn_mask: as in the functions.
        positions: as in the functions.
        dropout_p: as in the functions.
        backend: as in the functions.

    Returns:
        The pair (`backend`, `reason`).

    Raises:
        TypeError: not floating tensors of one dtype.
        ValueError: an unknown `backend`, or shapes that do not fit.

    Numerics:
        None: values of masks are looked at, nothing else.

    Source:
        Our own.

    Example:
        >>> import torch
        >>> from danlu.attention import explain_backend
        >>> explain_backend(*torch.randn(3, 1, 2, 16, 8)).reason
        'its 16 x 16 scores are few'
    """
    check_attention(query, key, value, None)
    rows, keys = query.shape[2], key.shape[2]
    if backend == "reference":
        return BackendChoice("reference", "it was asked for")
    if not in_bands(backend, query, key, value, attn_mask, dropout_p):
        few = f"its {rows} x {keys} scores are few"
        return BackendChoice("reference", _only_reference(attn_mask, dropout_p) or few)
    kernel = kernel_of(query, value)
    if kernel == "portable":
        reason = f"no flash kernel gives log-sum-exps for {query.dtype} on {query.device.type}: tiles in plain PyTorch"
        why = why_not(query, value) if query.device.type == "cuda" else None
        return BackendChoice("banded", reason if why is None else f"{reason}; of the kernel for CUDA: {why}")
    parts = jobs(rows, keys, Masks(key_padding_mask, cu_seqlens, attn_mask, positions))
    if any(part.masked for part in parts):
        why = "the visible keys of a sample have gaps"
        if attn_mask is not None or positions is not None:
            why = "there is an attn_mask" if attn_mask is not None else "there are positions"
        what = "flash kernels" if kernel == "cpu" else "plain PyTorch"
        return BackendChoice("banded", f"{what} on tiles of rows, because {why}")
    return BackendChoice("banded", f"flash kernels on bands of near and far keys, in {len(parts)} parts")


def check_backend(backend: str) -> None:
    """Raise `ValueError` unless it is known."""
    check_choice("backend", backend, ("auto", "banded", "reference"))


def in_bands(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> bool:
    """Whether to avoid holding the scores."""
    check_backend(backend)
    scores = query.shape[2] * key.shape[2]
    if backend == "reference" or scores == 0:
        return False
    large = scores >= _FLASH_FROM
    if kernel_of(query, value) == "portable":
        large = query.shape[0] * query.shape[1] * scores >= _TILES_FROM
    why = _only_reference(attn_mask, dropout_p)
    if why is None:
        return backend == "banded" or large
    if backend == "banded":
        raise ValueError(f"backend='banded' cannot run: {why}")
    if large:
        # Once per text and line by the default filter.
        text = f"attention falls back to the dense definition, which holds all scores, because {why}"
        warnings.warn(text, stacklevel=3)
    return False


def _only_reference(attn_mask: Tensor | None, dropout_p: float) -> str | None:
    """What the bands cannot do, if it is asked for."""
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask needs a gradient"
    return "the bands have no dropout" if dropout_p else None
