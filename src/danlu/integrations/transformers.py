"""transformers: token losses for its Trainer; and ReRoPE, prefixes and probes for its models, with files of their own.

Only public extension points are used: `Trainer(compute_loss_func=...)`. No class and no module of transformers is
changed.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from danlu.integrations.transformers_positions import DynamicRopeExtension, RopeExtension, extend_rope
from danlu.integrations.transformers_prefix import PrefixCollator, prefix_prompt, register_split_attention
from danlu.integrations.transformers_probe import AttentionProbe
from danlu.integrations.transformers_rerope import RopePatch, patch_rope

__all__ = [
    "AttentionProbe",
    "DynamicRopeExtension",
    "PrefixCollator",
    "RopeExtension",
    "RopePatch",
    "extend_rope",
    "patch_rope",
    "prefix_prompt",
    "register_split_attention",
    "token_loss",
]


class TokenLoss(Protocol):
    """A loss of logits `(..., V)` and targets `(...)`, such as `danlu.losses.tailr_loss` or a `partial` of it."""

    def __call__(self, input: Tensor, target: Tensor, *, ignore_index: int, reduction: Any, normalizer: Any) -> Tensor:
        """Return the reduced loss."""
        ...


def token_loss(
    loss: TokenLoss, *, shift: bool = True, ignore_index: int = -100
) -> Callable[[Any, Tensor, Any], Tensor]:
    r"""A token loss as `compute_loss_func` of `transformers.Trainer`.

    Definition:
        $$\frac{1}{N} \sum_{n} L(z_n, y_{n+1})$$
        over the labels that are not ignored, with $N$ the number of such labels in *all* micro-batches of the step, so
        that gradient accumulation gives the gradient of one large batch. With `shift=False` logits and labels are
        paired as they are.

    Args:
        loss: such as `danlu.losses.tailr_loss`, or `functools.partial(tailr_loss, gamma=0.3)`.
        shift: pair the logits of a position with the label of the next, as causal language models need.
        ignore_index: label that counts for nothing.

    Returns:
        A function of (outputs, labels, num_items_in_batch). Without that number it divides by the labels at hand.

    Raises:
        TypeError: `loss` is not callable.

    Numerics:
        As in the loss.

    Differences:
        With a `compute_loss_func` the Trainer does not divide by the number of accumulation steps, so a function that
        returned the mean of its micro-batch would make gradients too large by that number.

    Source:
        transformers' documentation of `Trainer.compute_loss_func`.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from danlu.integrations.transformers import token_loss
        >>> from danlu.losses import tailr_loss
        >>> compute_loss = token_loss(partial(tailr_loss, gamma=1.0))
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]])
        >>> compute_loss({"logits": logits}, labels).item()
        0.75
    """
    if not callable(loss):
        raise TypeError(f"loss must be callable, got {type(loss).__name__}")

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        targets = labels.to(logits.device)
        if shift:
            # The last position predicts nothing; moving the small labels avoids a copy of the logits.
            targets = nn.functional.pad(targets, (0, 1), value=ignore_index)[..., 1:]
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return loss(logits, targets, ignore_index=ignore_index, reduction="mean", normalizer=num_items_in_batch)

    return compute_loss
