r"""The flash kernels of CUDA in stock PyTorch: windows, and log-sum-exps out and in.

They are private operators, so their schemas are looked at once, on import, and their results once by device, on first
use; where they are others than expected tiles in plain PyTorch run instead.

Shape letters: as in `danlu.attention._band_kernels`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from danlu.attention._band_calls import Call

__all__ = ["backward", "forward", "why_not"]

_FORWARD = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "return_debug_mask"),
)
_BACKWARD = (
    *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "rng_state", "unused"),
)
_KEYWORDS = {"scale", "window_size_left", "window_size_right"}


def _resolved(name: str, positional: tuple[str, ...], outputs: int) -> Any:
    """The operator, or None if this version of PyTorch has none with these arguments."""
    operator = getattr(getattr(torch.ops.aten, name, None), "default", None)
    if operator is None:
        return None
    schema = operator._schema
    found = tuple(argument.name for argument in schema.arguments if not argument.kwarg_only)
    keywords = {argument.name for argument in schema.arguments if argument.kwarg_only}
    return operator if found == positional and keywords >= _KEYWORDS and len(schema.returns) == outputs else None


_OPERATORS = {
    "forward": _resolved("_flash_attention_forward", _FORWARD, 5),
    "backward": _resolved("_flash_attention_backward", _BACKWARD, 3),
}


def why_not(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot run for these tensors on CUDA; None if they can."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return "it is for bfloat16 and float16"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return "it is for heads of at most 256 channels"
    return _of_device(query.device.index)


def _of_device(index: int | None) -> str | None:
    if None in _OPERATORS.values():
        return f"its operators in torch {torch.__version__} are others than expected"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch has none"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"it needs compute capability 8.0, and the device has {major}.{minor}"
    try:
        agrees = _agrees(torch.device("cuda", index or 0))
    except RuntimeError as error:
        return f"it fails on this device: {error}"
    return None if agrees else "its results on this device differ from plain PyTorch's"


# What `torch.compiler.assume_constant_result` does, without its import of the compiler: the result goes into the graph.
vars(_of_device)["_dynamo_marked_constant"] = True


@cache
def _agrees(device: torch.device) -> bool:
    """Whether it aligns rows and keys at their ends, and gives and takes log-sum-exps, as the bands rely on."""
    rows, keys, dim, window, scale = 24, 40, 16, 7, 0.25
    # Waves, since a draw would change the user's random numbers.
    query, key, value, upstream = (
        torch.arange(2 * length * dim, device=device).mul(step).sin().view(1, 2, length, dim).to(torch.bfloat16)
        for length, step in ((rows, 1.7), (keys, 2.9), (keys, 0.3), (rows, 0.9))
    )
    for shape in ("full", "causal", "mirrored", "window"):
        # What is not a window is square where it hides anything.
        some = slice(0, rows) if shape in ("causal", "mirrored") else slice(0, keys)
        tensors = query, key[:, :, some], value[:, :, some]
        call = Call("near", slice(0, rows), some, shape)
        expected_out, expected_total, *expected = _plainly(tensors, upstream, _reach(call, window, True), scale)
        out, total = forward(call, *tensors, scale, window, True)
        grads = backward(call, [upstream, 0.5 * out, total + 1], *tensors, scale, window, True)
        pairs = zip((out, total, *grads), (expected_out, expected_total, *expected), strict=True)
        if any(not bool(((found - wanted).abs() < 0.05).all()) for found, wanted in pairs):
            return False
    return True


def _plainly(tensors: tuple[Tensor, ...], upstream: Tensor, reach: tuple[bool, int, int], scale: float) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients from half the output and from the log-sum-exp plus 1."""
    query, key, value, upstream = (x.float() for x in (*tensors, upstream))
    rows, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys, device=query.device)[keys - rows :, None] - torch.arange(keys, device=query.device)
    _, left, right = reach
    hidden = (distance > (keys if left < 0 else left)) | (distance < -(keys if right < 0 else right))
    scores = (scale * query @ key.transpose(-2, -1)).masked_fill(hidden, -torch.inf)
    total = scores.logsumexp(-1)
    out = (scores - total[..., None]).exp() @ value
    weights = (scores - total[..., None] - 1).exp()
    inner = upstream @ value.transpose(-2, -1) - (0.5 * upstream * out).sum(-1, keepdim=True)
    inner = scale * inner * weights
    return [out, total, inner @ key, inner.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ upstream]


def _reach(call: Call, window: int, is_causal: bool) -> tuple[bool, int, int]:
    """Whether the call is causal, and how far rows see to the left and right; -1 is all the way.

    Rows and keys end together, as the kernel wants it.
    """
    if call.shape == "window":
        return is_causal, window - 1, 0 if is_causal else window - 1
    return {"full": (False, -1, -1), "causal": (True, -1, 0), "mirrored": (False, 0, -1)}[call.shape]


def forward(
    call: Call, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, T, D)` and log-sum-exp `(B, H, T)` in float32."""
    causal, left, right = _reach(call, window, is_causal)
    out, total, *_ = _OPERATORS["forward"](
        *(x.transpose(1, 2) for x in (query, key, value)),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out.transpose(1, 2), total


def backward(
    call: Call,
    of_rows: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int,
    is_causal: bool,
) -> list[Tensor]:
    """Gradients of query, key and value; `of_rows`: upstream gradient, output, log-sum-exp of the whole row."""
    upstream, out, total = of_rows
    causal, left, right = _reach(call, window, is_causal)
    # The state of a random generator, of which nothing is read without dropout.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    grads = _OPERATORS["backward"](
        *(_rows_last(x) for x in (upstream, query, key, value, out)),
        # The kernel knows its rows by their number alone.
        total.contiguous(),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        state,
        state[0],
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return [grad.transpose(1, 2) for grad in grads]


def _rows_last(tensor: Tensor) -> Tensor:
    """(B, H, T, D) as (B, T, H, D), with the channels side by side."""
    tensor = tensor.transpose(1, 2)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
