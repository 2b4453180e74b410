r"""First codewords from real keys, by k-means.

Source: Arthur and Vassilvitskii (2007), "k-means++: The Advantages of Careful Seeding"; Lloyd (1982).

Shape letters: as in `danlu.attention._vector_quantizer`; `P` visible keys of all samples.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from danlu._common.checks import check_integer, is_low_precision
from danlu.attention._vector_quantizer import VectorQuantizer, look_up, nearest_codes

__all__ = ["init_codebook_from_keys"]


@torch.no_grad()
def init_codebook_from_keys(
    target: nn.Module,
    data: Tensor | tuple[object, ...] | Mapping[str, object],
    *,
    key_padding_mask: Tensor | None = None,
    iterations: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    r"""Set codebooks to the cluster centers of real keys: of one quantizer, or of all in a model, layer by layer.

    Definition:
        Per head, $C$ minimizes $\sum_j \min_s \lVert k_j - C_s \rVert^2$ locally: k-means++ draws the first codeword
        among the keys and every further one with probability proportional to the squared distance to those before it;
        then `iterations` times every codeword moves to the mean of its keys, and one without keys stays. $n_s$ is the
        number of its keys.

    Args:
        target: a [`VectorQuantizer`][danlu.attention.VectorQuantizer], or a model that holds some.
        data: keys `(B, H, N, D)` for a quantizer. For a model its input: a tensor, the tuple of its positional or the
            mapping of its keyword arguments. It is called once, in evaluation mode; each quantizer is set when its keys
            arrive, so later layers see what the new codebooks of earlier ones make of the input.
        key_padding_mask: bool, shape `(B, N)`, True = visible, for a quantizer; a model gets it with its input.
        iterations: Lloyd's steps, 0 or more.
        seed: of the draws.

    Returns:
        Relative error $\sum \lVert k - \hat k \rVert^2 / \sum \lVert k \rVert^2$ on these keys, by the name of the
        quantizer within `target` ("" for itself).

    Raises:
        TypeError: `target` is not a module.
        ValueError: `target` holds no quantizer, the model calls none of them, or no key is visible.

    Numerics:
        In float32 for half keys; in evaluation mode, without gradients. If there are no more distinct keys than
        codewords, every key is a codeword and the error is 0.

    Cost:
        $2PSD$ flops per head for the seeding and for every iteration.

    Source:
        Arthur and Vassilvitskii (2007), section 2.2.

    Example:
        >>> import torch
        >>> from danlu.attention import VectorQuantizer, init_codebook_from_keys
        >>> init_codebook_from_keys(VectorQuantizer(16, 8, 2), torch.randn(1, 2, 16, 8))
        {'': 0.0}
    """
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a torch.nn.Module, got {type(target).__name__}")
    check_integer("iterations", iterations, low=0)
    generator = torch.Generator().manual_seed(check_integer("seed", seed, low=0))
    if isinstance(target, VectorQuantizer):
        if not isinstance(data, Tensor):
            raise TypeError(f"data must be keys, a torch.Tensor, for a VectorQuantizer, got {type(data).__name__}")
        return {"": _set(target, data, key_padding_mask, iterations, generator)}
    if key_padding_mask is not None:
        raise ValueError("key_padding_mask goes to a model with its input; here it is for a single VectorQuantizer")
    quantizers = {name: module for name, module in target.named_modules() if isinstance(module, VectorQuantizer)}
    if not quantizers:
        raise ValueError(f"target holds no VectorQuantizer, got {type(target).__name__}")
    errors: dict[str, float] = {}
    names = {id(module): name for name, module in quantizers.items()}

    def set_first(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        name = names[id(module)]
        if name not in errors:
            given = dict(zip(("key", "key_padding_mask"), args, strict=False)) | dict(kwargs)
            mask = cast("Tensor | None", given.get("key_padding_mask"))
            errors[name] = _set(
                cast("VectorQuantizer", module), cast("Tensor", given["key"]), mask, iterations, generator
            )

    training = {module: module.training for module in target.modules()}
    hooks = [module.register_forward_pre_hook(set_first, with_kwargs=True) for module in quantizers.values()]
    try:
        target.eval()
        if isinstance(data, Mapping):
            target(**data)
        else:
            target(*(data if isinstance(data, tuple) else (data,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if not errors:
        raise ValueError("the model called none of its quantizers")
    return errors


def _set(
    quantizer: VectorQuantizer,
    key: Tensor,
    key_padding_mask: Tensor | None,
    iterations: int,
    generator: torch.Generator,
) -> float:
    quantizer.check_keys(key, key_padding_mask)
    points = key.detach().transpose(0, 1)
    points = points.flatten(1, 2) if key_padding_mask is None else points[:, key_padding_mask]
    if points.shape[1] == 0:
        raise ValueError(f"there must be a visible key, got keys of shape {tuple(key.shape)}")
    points = points.float() if is_low_precision(points.dtype) else points
    with torch.autocast(device_type=key.device.type, enabled=False):
        words = _spread(points, quantizer.num_codes, generator)
        for _ in range(iterations):
            words, _ = _lloyd(points, words)
        quantizer.set_codebook(words, _lloyd(points, words)[1])
        words = quantizer.codebook.to(points)
        distances = (points - look_up(words, nearest_codes(points[None], words))[0]).square().sum()
        return float(distances / points.square().sum().clamp_min(torch.finfo(points.dtype).tiny))


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: points `(H, S, D)`, each drawn by its squared distance to those before it."""
    heads, total, _ = points.shape
    every = torch.arange(heads, device=points.device)
    chosen = points.new_empty(heads, count, points.shape[-1])
    distance = points.new_ones(heads, total)
    for index in range(count):
        # All points may be codewords already: then any may be drawn again.
        spent = distance.amax(-1, keepdim=True) <= 0
        share = torch.where(spent, 1.0, distance).cumsum(-1)
        # Not `multinomial`, which takes at most 2^24 points.
        draw = torch.rand(heads, 1, generator=generator, dtype=torch.float64).to(share) * share[:, -1:]
        place = torch.searchsorted(share, draw, right=True)[:, 0].clamp_max(total - 1)
        chosen[:, index] = points[every, place]
        fresh = (points - chosen[:, index, None]).square().sum(-1)
        distance = fresh if index == 0 else torch.minimum(distance, fresh)
    return chosen


def _lloyd(points: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the points of every codeword, which stays where it has none; and the numbers of points."""
    heads, count, size = words.shape
    rows = nearest_codes(points[None], words)[0] + count * torch.arange(heads, device=points.device)[:, None]
    sums = points.new_zeros(heads * count, size).index_add_(0, rows.flatten(), points.reshape(-1, size))
    counts = points.new_zeros(heads * count).index_add_(0, rows.flatten(), points.new_ones(rows.numel()))
    means = sums / counts.clamp_min(1.0)[:, None]
    moved = torch.where(counts[:, None] > 0, means, words.flatten(0, 1))
    return moved.view_as(words), counts.view(heads, count)
