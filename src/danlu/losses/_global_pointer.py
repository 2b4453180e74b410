r"""The multi-label loss of GlobalPointer's span scores from queries and keys, without ever holding all scores.

Source: Su et al. (2022), "Global Pointer: Novel Efficient Span-based Approach for Named Entity Recognition", arXiv
2208.03054; "GlobalPointer：用统一的方式处理嵌套和非嵌套NER" (2021-05-01).

Shape letters: `B` samples; `T` types of spans; `n` tokens; `D` channels; `S` spans.
"""

import math

import torch
from torch import Tensor

from danlu._common.checks import check_bool, check_floating, check_real, check_same_device, is_low_precision
from danlu._common.reduction import Reduction, check_reduction
from danlu.losses._global_pointer_engine import Plan, SpanLoss
from danlu.losses._global_pointer_ops import compiled_span_loss
from danlu.losses._multilabel import refuse_where
from danlu.losses._prepared import Prepared

__all__ = ["global_pointer_loss"]


def global_pointer_loss(
    query: Tensor,
    key: Tensor,
    spans: Tensor,
    *,
    mask: Tensor | None = None,
    start_bias: Tensor | None = None,
    end_bias: Tensor | None = None,
    causal_mask: bool = True,
    scale: float | None = None,
    threshold: float = 0.0,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""[`multilabel_cross_entropy`][danlu.losses.multilabel_cross_entropy] of all spans, a block of scores at a time.

    Definition:
        $$s_\alpha(i, j) = c\; q_{\alpha,i}^\top k_{\alpha,j} + u_{\alpha,i} + v_{\alpha,j}, \qquad
        L_{b\alpha} = \log\Big(1 + \sum_{(i,j)\in P} e^{-s_\alpha(i,j)}\Big)
        + \log\Big(1 + \sum_{(i,j)\in Q} e^{s_\alpha(i,j)}\Big)$$
        for every sample $b$ and type $\alpha$, with $q$ = `query`, $k$ = `key`, $c$ = `scale`, $u$ = `start_bias`,
        $v$ = `end_bias`, scores minus `threshold`, $P$ = `spans` of that sample and type, and $Q$ all other $i \le j$
        whose tokens are not padding.

    Args:
        query: of the first token, shape `(B, T, n, D)`, or `(B, n, D)` if all types share it; rotated, if at all.
        key: of the last token, the shape of `query`.
        spans: the positives, int64, shape `(S, 4)`: sample, type, first token and last token (inclusive), in any
            order; rows of -1 are filling and a span that occurs twice counts once.
        mask: tokens, bool, shape `(B, n)`, True = real; None means all.
        start_bias: shape `(B, T, n)`, or None; required if `query` is shared.
        end_bias: as `start_bias`.
        causal_mask: whether a span must not end before it starts.
        scale: None means $1/\sqrt D$.
        threshold: score above which a span is predicted.
        reduction: "mean" sums over types and averages over samples, "sum", or "none" for shape `(B, T)`.
        normalizer: replaces `B` as the denominator of "mean".

    Returns:
        A scalar (nats), or shape `(B, T)` with "none"; float32 for half inputs, else dtype of `query`. It equals the
        loss of the dense scores.

    Raises:
        TypeError: a dtype is none of the above.
        ValueError: shapes or devices do not fit, or, on the CPU, a span is out of range, ends before it starts or
            touches padding; the message has its row.
        RuntimeError: from a second derivative and from forward mode, which are not supported.

    Numerics:
        Half inputs are computed in float32, autocast or not. What padding holds changes nothing, NaN included, and its
        gradient is exactly 0. NaN in a token stays within its sample and type.

    Cost:
        $6BTn^2D$ flops for value and gradients, of which the scores are a third, and memory for half a million scores,
        or $n^2$ if that is more, beside the gradients of the inputs. The dense form holds $BTn^2$ scores several
        times. Types that share queries and keys share the product.

    Source:
        Su et al. (2022), arXiv 2208.03054; the gradient weights are own derivations: $e^s/(1+\sum_Q e^s)$ for a
        negative and $-e^{-s}/(1+\sum_P e^{-s})$ for a positive.

    Example:
        >>> import torch
        >>> from danlu.losses import global_pointer_loss
        >>> query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
        >>> loss = global_pointer_loss(query, key, torch.tensor([[0, 1, 0, 2]]))
        >>> loss  # log 7, and log 2 + log 6: three tokens have six spans
        tensor(4.4308)
    """
    _check(query, key, spans, mask, start_bias, end_bias)
    check_real("threshold", threshold)
    check_reduction(reduction, normalizer)
    if scale is not None:
        check_real("scale", scale)
    shared = query.ndim == 3
    samples, tokens, channels = query.shape[0], query.shape[-2], query.shape[-1]
    types = start_bias.shape[1] if start_bias is not None else query.shape[1]
    _check_spans(spans, mask, (samples, types, tokens), causal_mask)
    plan = Plan(
        types=types,
        shared=shared,
        causal=causal_mask,
        scale=1 / math.sqrt(channels) if scale is None else scale,
        threshold=threshold,
    )
    dtype = torch.float32 if is_low_precision(query.dtype) else query.dtype
    rows = torch.ones(samples, types, dtype=dtype, device=query.device)
    if reduction == "mean":
        count = max(1, samples) if normalizer is None else normalizer
        rows = rows / (count.detach().reshape(()).to(dtype) if isinstance(count, Tensor) else count)
    # Asked here because a forward without context cannot.
    grad = torch.is_grad_enabled()
    inputs = (query, key, start_bias, end_bias)
    needs = tuple(grad and tensor is not None and tensor.requires_grad for tensor in inputs)
    if torch.compiler.is_compiling():
        return compiled_span_loss(inputs, spans, mask, rows, plan, None if reduction == "none" else needs)
    return SpanLoss.apply(*inputs, spans, mask, rows, plan, None if reduction == "none" else Prepared(needs))


def _check(
    query: Tensor,
    key: Tensor,
    spans: Tensor,
    mask: Tensor | None,
    start_bias: Tensor | None,
    end_bias: Tensor | None,
) -> None:
    check_floating("query", query)
    check_floating("key", key)
    if query.ndim not in (3, 4) or query.shape != key.shape or query.shape[-1] == 0:
        raise ValueError(
            "query and key must have one shape (B, T, n, D) or (B, n, D), "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must have one dtype, got {query.dtype} and {key.dtype}")
    samples, tokens = query.shape[0], query.shape[-2]
    if (start_bias is None) != (end_bias is None) or (start_bias is None and query.ndim == 3):
        raise ValueError("start_bias and end_bias go together, and types that share queries need both")
    for name, bias in (("start_bias", start_bias), ("end_bias", end_bias)):
        if bias is None or start_bias is None:
            continue
        check_floating(name, bias)
        types = query.shape[1] if query.ndim == 4 else start_bias.shape[1] if start_bias.ndim == 3 else 0
        if bias.shape != (samples, types, tokens):
            raise ValueError(
                f"{name} must have shape (B, T, n) that fits query {tuple(query.shape)}, got {tuple(bias.shape)}"
            )
    if not isinstance(spans, Tensor) or spans.dtype != torch.int64:
        kind = spans.dtype if isinstance(spans, Tensor) else type(spans).__name__
        raise TypeError(f"spans must be an int64 tensor, got {kind}")
    if spans.ndim != 2 or spans.shape[1] != 4:
        raise ValueError(f"spans must have shape (S, 4): sample, type, first, last; got {tuple(spans.shape)}")
    if mask is not None:
        check_bool("mask", mask, "real")
        if mask.shape != (samples, tokens):
            raise ValueError(f"mask must have shape (B, n) = {(samples, tokens)}, got {tuple(mask.shape)}")
    check_same_device(query=query, key=key, spans=spans, mask=mask, start_bias=start_bias, end_bias=end_bias)


def _check_spans(spans: Tensor, mask: Tensor | None, sizes: tuple[int, int, int], causal: bool) -> None:
    if spans.device.type != "cpu" or torch.compiler.is_compiling() or not len(spans):
        return
    samples, types, tokens = sizes
    filling = (spans == -1).all(1)
    limits = spans.new_tensor([samples, types, tokens, tokens])
    wrong = ((spans < 0) | (spans >= limits)).any(1) & ~filling
    refuse_where(wrong, f"spans must lie in {samples} samples, {types} types and {tokens} tokens, or be -1 throughout")
    if causal:
        refuse_where((spans[:, 2] > spans[:, 3]) & ~filling, "a span must not end before it starts")
    if mask is not None and samples and tokens:
        kept = spans.clamp(min=0)
        seen = mask[kept[:, 0], kept[:, 2]] & mask[kept[:, 0], kept[:, 3]]
        refuse_where(~seen & ~filling, "a span must not touch padding")
