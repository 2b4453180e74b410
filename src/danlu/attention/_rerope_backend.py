r"""Which implementation of rotary attention runs, and why.

Shape letters: as in `danlu.attention._rerope`.
"""

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from danlu._common.checks import check_choice
from danlu.attention._band_calls import Masks, jobs
from danlu.attention._bands import has_flash
from danlu.attention._masks import check_attention

__all__ = ["Backend", "BackendChoice", "check_backend", "explain_backend", "in_bands"]

Backend = Literal["auto", "banded", "reference"]

# From so many scores of a head on, the flash kernels of the CPU are faster than the dense definition.
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
    backend: Backend = "auto",
) -> BackendChoice:
    r"""What `rope_attention` and `rerope_attention` would run for these arguments, without running it.

    Definition:
        "reference" is the dense definition with all scores in memory. "banded" never holds them: on the CPU flash
        kernels on bands of near and far keys, and on tiles of 64 rows where masks have gaps; on other devices tiles in
        plain PyTorch. "auto" takes "banded" from $MN = 2^{16}$ on where there are flash kernels, and from
        $BHMN = 2^{27}$ on elsewhere, so that the memory is bounded everywhere; it warns where an `attn_mask` needs a
        gradient, which only "reference" has.

    Args:
        query: as in the functions, shape `(B, H, M, D)`.
        key: shape `(B, H_kv, N, D)`.
        value: shape `(B, H_kv, N, E)`.
        key_padding_mask: as in the functions.
        cu_seqlens: as in the functions.
        attn_mask: as in the functions.
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
    if not in_bands(backend, query, key, attn_mask):
        few = f"its {rows} x {keys} scores are few"
        return BackendChoice("reference", _NEEDS_GRAD if _needs_grad(attn_mask) else few)
    if not has_flash(query):
        reason = f"no flash kernel gives log-sum-exps for {query.dtype} on {query.device.type}: tiles in plain PyTorch"
        return BackendChoice("banded", reason)
    parts = jobs(rows, keys, Masks(key_padding_mask, cu_seqlens, attn_mask))
    if any(part.masked for part in parts):
        why = "there is an attn_mask" if attn_mask is not None else "the visible keys of a sample have gaps"
        return BackendChoice("banded", f"flash kernels on tiles of rows, because {why}")
    return BackendChoice("banded", f"flash kernels on bands of near and far keys, in {len(parts)} parts")


def check_backend(backend: str) -> None:
    """Raise `ValueError` unless it is known."""
    check_choice("backend", backend, ("auto", "banded", "reference"))


def in_bands(backend: Backend, query: Tensor, key: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether to avoid holding the scores."""
    check_backend(backend)
    scores = query.shape[2] * key.shape[2]
    if backend == "reference" or scores == 0:
        return False
    large = scores >= _FLASH_FROM
    if not has_flash(query):
        large = query.shape[0] * query.shape[1] * scores >= _TILES_FROM
    if not _needs_grad(attn_mask):
        return backend == "banded" or large
    if backend == "banded":
        raise ValueError(f"backend='banded' cannot run: {_NEEDS_GRAD}")
    if large:
        # Once per text and line by the default filter.
        text = f"attention falls back to the dense definition, which holds all scores, because {_NEEDS_GRAD}"
        warnings.warn(text, stacklevel=3)
    return False


_NEEDS_GRAD = "attn_mask needs a gradient"


def _needs_grad(attn_mask: Tensor | None) -> bool:
    return attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
