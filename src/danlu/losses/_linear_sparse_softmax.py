r"""The loss of sparse softmax on a linear head: one product forward, and a few rows of the weight backward.

Source: Sun et al. (2021), "Sparse-softmax: A Simpler and Faster Alternative Softmax Transformation", arXiv 2112.12433.

Shape letters: `N` rows; `D` features; `V` classes; `C` rows of a chunk; `E` classes with a gradient, over all rows.
"""

import torch
from torch import Tensor

from danlu._common.checks import check_integer
from danlu._common.reduction import Reduction, check_reduction, reduce_loss
from danlu.losses._linear import check_head, product_dtype
from danlu.losses._linear_sparse_softmax_engine import sparse_rows
from danlu.losses._targets import check_range, check_row_values

__all__ = ["linear_sparse_softmax_loss"]


def linear_sparse_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    k: int = 10,
    linear_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    check: bool = False,
) -> Tensor:
    r"""[`sparse_softmax_loss`][danlu.losses.sparse_softmax_loss] of a linear head, without holding its logits.

    Definition:
        With $z_n = W h_n + b$, $\Omega_n$ = the $k$ largest logits of row $n$ (and those that tie with the smallest of
        them), $p_n = \operatorname{softmax}_{\Omega_n}(z_n)$ and $g_n$ the weight of the row in the reduced loss,
        $$L_n = \log\sum_{v \in \Omega_n} e^{z_{nv}} - z_{n y_n}, \qquad
        \nabla_{h_n} = g_n\Big(\sum_{v \in \Omega_n} p_{nv} W_v - W_{y_n}\Big), \qquad
        \nabla_{W_v} = \sum_n g_n\,(p_{nv}\,[v \in \Omega_n] - [v = y_n])\,h_n$$
        with $h$ = `input`, $W$ = `linear_weight`, $b$ = `linear_bias` and $y$ = `target`.

    Args:
        input: hidden states, shape `(..., D)`, floating.
        linear_weight: shape `(V, D)`, dtype of `input` (any floating dtype under autocast).
        target: classes, shape `(...)`, int64, in $[0, V)$ or `ignore_index`.
        k: from 1 to `V`. The default is that of the paper's experiments.
        linear_bias: shape `(V,)`, or None.
        token_weight: multiplies the loss of every row, shape `(...)`; not differentiated.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for one loss per row.
        normalizer: replaces the denominator of "mean", such as the number of tokens in all micro-batches of a step.
        chunk_size: rows per chunk; None as in [`linear_loss`][danlu.losses.linear_loss].
        check: look for targets that are not classes on an accelerator, too, which waits for the device.

    Returns:
        A scalar (nats), or shape `(...)` with "none"; float32 for half inputs, else dtype of `input`. All rows ignored
        gives 0 with zero gradients.

    Raises:
        TypeError: dtypes do not fit, a tensor is sharded, or `k` or `chunk_size` is not an int.
        ValueError: shapes or devices do not fit, an option is out of its range, `token_weight` requires a gradient, or,
            on the CPU, a target is not a class.
        RuntimeError: from a second derivative, a forward-mode derivative, or `vmap`, which are not supported.

    Numerics:
        As in [`linear_loss`][danlu.losses.linear_loss]; the gradients of $W$ are summed in float32 for half inputs.

    Cost:
        $2NVD$ flops for the logits and $4N(k+1)D$ for both gradients, where a loss with a dense gradient takes $6NVD$;
        and one `torch.topk` of every row. Extra memory: $4CV$ bytes for the chunk, $4VD$ for the weight's gradient
        (none if it is frozen), and $O(Nk + ND)$. Where more than $C(k+1)$ further logits of a chunk tie, as all do in a
        head of zeros, the rows that they are in take a dense gradient, chunk by chunk: $8NVD$ flops and $12CV$ bytes.
        On accelerators the search for ties waits for the device once per chunk. `torch.compile(fullgraph=True)` takes
        the loss as one operator, which keeps room for as many ties; within `torch.func` transforms it breaks the graph.

    Differences:
        The gradient of $W$ is a dense tensor, as every optimizer takes it; its rows that no token touched are 0.

    Source:
        arXiv 2112.12433; "通向概率分布之路:盘点Softmax及其替代品" (2024-06-14), section on Sparse Softmax.

    Example:
        >>> import torch
        >>> from danlu.losses import linear_sparse_softmax_loss
        >>> hidden, head = torch.eye(3), torch.tensor([[0.5, 0.0, 0.0], [1.0, 0.0, 0.0], [1.4, 0.0, 0.0]])
        >>> linear_sparse_softmax_loss(hidden[:1], head, torch.tensor([2]), k=2)
        tensor(0.5130)
    """
    check_head(input, linear_weight, linear_bias, target)
    classes, count = linear_weight.shape[0], target.numel()
    check_integer("k", k, low=1)
    check_reduction(reduction, normalizer)
    if token_weight is not None:
        check_row_values("token_weight", token_weight, target)
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, low=1)
    keep = check_range(target, classes, ignore_index, check=check)
    if k > classes:
        raise ValueError(f"k must be at most the number of classes, got {k} for {classes}")
    dtype = product_dtype(input, linear_weight, torch.is_autocast_enabled(input.device.type))
    rows = sparse_rows(
        input.reshape(count, input.shape[-1]),
        linear_weight,
        linear_bias,
        target.reshape(-1).masked_fill(~keep.reshape(-1), 0),
        keep.reshape(-1),
        k,
        chunk_size,
        dtype,
    ).view(target.shape)
    if token_weight is not None:
        rows = rows * token_weight.to(rows.dtype)
    return reduce_loss(rows.masked_fill(~keep, 0.0), keep, reduction, normalizer)
