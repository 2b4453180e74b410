"""transformers: attention whose weights come from any map of `danlu.simplex`.

Only public extension points are used: `AttentionInterface` and `AttentionMaskInterface`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from danlu.simplex import entmax, entmax15, perturb_max, softmax, sparse_softmax, sparsemax, taylor_softmax

__all__ = ["SimplexMap", "register_attention"]

_PREFIX = "danlu_"


class SimplexMap(Protocol):
    """A map of scores to weights along `dim`, in which a score of minus infinity is a mask."""

    def __call__(self, input: Tensor, *, dim: int) -> Tensor:
        """Return the weights."""
        ...


def _ten_largest(input: Tensor, *, dim: int) -> Tensor:
    """Sparse softmax of the paper's `k`, which decoding reaches only after ten keys."""
    return sparse_softmax(input, dim=dim, k=min(10, input.shape[dim]))


_MAPS: Mapping[str, SimplexMap] = {
    "entmax125": partial(entmax, alpha=1.25),
    "entmax15": entmax15,
    "perturb_max": partial(perturb_max, nodes=32),
    "softmax": softmax,
    "sparse_softmax": _ten_largest,
    "sparsemax": sparsemax,
    "taylor_softmax": taylor_softmax,
}


def register_attention(name: str, map: SimplexMap | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    r"""Register an attention function for `attn_implementation=name` of every model of transformers.

    Definition:
        $$A = f\Big(\frac{Q K^\top}{\sqrt d} + B + M\Big), \qquad O = A V$$
        with a map $f$ = `map` in place of softmax, the model's position bias $B$ if it has one (T5), and $-\infty$ in
        $M$ where a key is hidden. A query that sees no key has weights 0 and output 0.

    Args:
        name: "danlu_softmax", "danlu_sparsemax", "danlu_entmax15", "danlu_entmax125" (alpha 1.25),
            "danlu_sparse_softmax" (10 keys), "danlu_taylor_softmax" or "danlu_perturb_max"; or any name of your own
            with a `map`.
        map: a function `(scores, *, dim)`, such as `functools.partial(entmax, alpha=1.3)`.

    Returns:
        The function that was registered.

    Raises:
        TypeError: `map` is not callable.
        ValueError: `name` is not one of these and there is no `map`; and when a model with attention sinks calls it,
            which are a part of softmax.

    Numerics:
        Half scores are computed in float32 by the maps and rounded once. Additive masks count as hidden where they are
        at the lowest finite number of their dtype, or below half of it.

    Cost:
        The dense definition: time and memory are $O(L^2)$ per layer, and the weights are returned.

    Differences:
        The mask function is registered under the same name, too; without it transformers passes no mask for padding.

    Source:
        transformers' documentation of the attention interface; for sparse attention Correia, Niculae and Martins
        (2019), arXiv 1909.00015.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from danlu.integrations.transformers_attention import register_attention
        >>> attention = register_attention("danlu_entmax15")
        >>> config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2, attn_implementation="danlu_entmax15")
        >>> LlamaForCausalLM(config)(torch.arange(8)[None], output_attentions=True).attentions[0].shape
        torch.Size([1, 2, 8, 8])
    """
    if map is None:
        known = {f"{_PREFIX}{one}": function for one, function in _MAPS.items()}
        if name not in known:
            raise ValueError(f"name must be one of {', '.join(known)}, or come with a map, got {name!r}")
        map = known[name]
    if not callable(map):
        raise TypeError(f"map must be callable, got {type(map).__name__}")
    function = partial(_attend, map)
    # Both, or padding would be ignored: without a mask function the attention gets no mask.
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    return function


def _attend(
    map: SimplexMap,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Query `(B, H, T, D)`, key and value `(B, G, S, D)` with H a multiple of G; output `(B, T, H, D)` and weights."""
    if any(kwargs.get(sinks) is not None for sinks in ("s_aux", "sinks")):
        raise ValueError("attention sinks are a part of softmax and have no meaning for other maps")
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups * queries, width)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(batch, heads, queries, key.shape[2])
    scores = scores * (width**-0.5 if scaling is None else scaling)
    softcap = kwargs.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = kwargs.get("position_bias")
    if bias is not None:
        scores = scores + bias[..., : key.shape[2]]
    is_causal = kwargs.get("is_causal")
    scores = _masked(scores, attention_mask, getattr(module, "is_causal", True) if is_causal is None else is_causal)
    weights = nn.functional.dropout(map(scores, dim=-1), p=dropout, training=module.training)
    out = torch.matmul(weights.view(batch, groups, heads // groups * queries, -1).to(value.dtype), value)
    return out.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    queries, keys = scores.shape[-2:]
    hidden = float("-inf")
    if mask is None:
        if not is_causal or queries == 1:
            return scores
        # More keys than queries without a mask are the slots of a static cache that are still empty: the first query
        # is in the first slot.
        slots = torch.arange(keys, device=scores.device)
        return scores.masked_fill(slots > slots[:queries, None], hidden)
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, hidden)
    # Sums of lowest numbers and scores are finite, and a map that is not softmax would give them weights.
    return (scores + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, hidden)
