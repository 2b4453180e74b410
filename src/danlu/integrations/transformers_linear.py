"""transformers: losses of a causal language model's head without its logits, also in the Trainer.

Only public accessors are used: the model's base model, its output embedding and its configuration. No class of
transformers is changed.
"""

import inspect
import weakref
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from danlu.losses import CrossEntropy, LinearStats, linear_loss

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

__all__ = ["LinearLossMixin", "fused_causal_lm_loss"]

# Models whose head was compared with ours.
_compared: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@overload
def fused_causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    loss: Any = None,
    num_items_in_batch: float | Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    return_stats: Literal[False] = False,
    **inputs: Any,
) -> Tensor: ...


@overload
def fused_causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    loss: Any = None,
    num_items_in_batch: float | Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    return_stats: Literal[True],
    **inputs: Any,
) -> tuple[Tensor, LinearStats]: ...


def fused_causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    loss: Any = None,
    num_items_in_batch: float | Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    return_stats: bool = False,
    **inputs: Any,
) -> Tensor | tuple[Tensor, LinearStats]:
    r"""The loss of a causal language model, without ever holding its logits.

    Definition:
        [`linear_loss`][danlu.losses.linear_loss] of the last hidden states and the output embedding, with the logit
        scale and the softcap of the model's configuration, each position against the label of the next; divided by
        the labels that are not ignored, or by `num_items_in_batch`.

    Args:
        model: a causal language model of transformers, also wrapped by DDP. It runs as usual, for the logits of the
            last position only. Tied embeddings get both gradients.
        input_ids: tokens, shape `(batch, length)`; None if `inputs_embeds` is among `inputs`.
        attention_mask: as for the model.
        labels: shape `(batch, length)`, not shifted; `ignore_index` counts for nothing.
        loss: a row loss or callable of `linear_loss`; None is `CrossEntropy()`.
        num_items_in_batch: number of labels in all micro-batches of the step, as the Trainer passes it.
        shift: pair a position with the label of the next; False pairs them as they are.
        ignore_index: label that counts for nothing.
        chunk_size: as in `linear_loss`.
        return_stats: also return the statistics of `linear_loss`, of the shape of `labels`.
        inputs: further inputs of the model, such as `position_ids`.

    Returns:
        A scalar; with `return_stats` the pair of that and a `LinearStats`.

    Raises:
        ValueError: there are no labels, or the model is not one whose head can be taken apart: it has no output
            embedding that is a plain linear layer, cannot be asked for the logits of the last position alone, or
            changes its logits in another way than by the scales and softcaps known here. That is found by comparing
            the last position's logits on the first call.

    Numerics:
        As in [`linear_loss`][danlu.losses.linear_loss].

    Cost:
        As there, and on the first call of every model a comparison of a few logits.

    Differences:
        Auxiliary losses of the model, such as those of a router, are not added.

    Source:
        transformers' documentation of `get_output_embeddings` and `logits_to_keep`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from danlu.integrations.transformers_linear import fused_causal_lm_loss
        >>> from danlu.losses import TaiLr
        >>> config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model, tokens = LlamaForCausalLM(config), torch.arange(8)[None]
        >>> fused_causal_lm_loss(model, tokens, labels=tokens, loss=TaiLr(0.1)).shape
        torch.Size([])
    """
    if labels is None:
        raise ValueError("labels are needed")
    inner = _inner(model)
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"the head of {type(inner).__name__} is a {type(head).__name__}, not a plain linear layer")
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        raise ValueError(f"{type(inner).__name__} cannot be asked for the logits of the last position alone")
    scale, softcap = _logit_options(inner)
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0])

    # The whole model runs, and not its decoder alone, so that DDP knows of the pass.
    handle = inner.base_model.register_forward_hook(catch)
    try:
        if input_ids is not None:
            inputs = {"input_ids": input_ids, **inputs}
        outputs = model(attention_mask=attention_mask, logits_to_keep=1, **inputs)
    finally:
        handle.remove()
    hidden = caught[-1]
    if inner not in _compared:
        _compare(inner, head, hidden, outputs.logits, scale, softcap)
        _compared.add(inner)
    targets = labels.to(hidden.device)
    if shift:
        # The last position predicts nothing; moving the small labels avoids a copy of the hidden states.
        targets = nn.functional.pad(targets, (0, 1), value=ignore_index)[..., 1:]
    found: Any = linear_loss(
        hidden,
        head.weight,
        targets,
        CrossEntropy() if loss is None else loss,
        linear_bias=head.bias,
        logit_scale=scale,
        softcap=softcap,
        ignore_index=ignore_index,
        normalizer=num_items_in_batch,
        chunk_size=chunk_size,
        return_stats=return_stats,
    )
    return found


def _inner(model: nn.Module) -> PreTrainedModel:
    """The model inside DDP, `torch.compile` or an adapter."""
    inner: Any = model
    for _ in range(8):
        if isinstance(inner, PreTrainedModel):
            return inner
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            inner = getattr(inner, "module", getattr(inner, "_orig_mod", None))
    raise ValueError(f"model must be a transformers model, got {type(model).__name__}")


def _logit_options(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and softcap of the logits by the names that configurations have for them."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


@torch.no_grad()
def _compare(
    model: PreTrainedModel, head: nn.Linear, hidden: Tensor, logits: Tensor, scale: float, softcap: float | None
) -> None:
    """Raise unless the logits of the last position are those that `linear_loss` will take."""
    mine = scale * head(hidden[:, -1:])
    if softcap is not None:
        mine = softcap * torch.tanh(mine / softcap)
    difference = (mine.float() - logits.float()).abs().max()
    if not bool(difference <= 0.02 * logits.float().abs().max() + 1e-3):
        raise ValueError(
            f"the logits of {type(model).__name__} are not a linear function of its last hidden states with a scale "
            "and a softcap known here; take token_loss, which needs the logits"
        )


class LinearLossMixin(_Trainer):
    r"""A Trainer that never holds the logits: `class Fused(LinearLossMixin, Trainer): pass`.

    Definition:
        `compute_loss` is [`fused_causal_lm_loss`][danlu.integrations.transformers_linear.fused_causal_lm_loss], in
        training and in evaluation.

    Args:
        row_loss: a row loss or callable of [`linear_loss`][danlu.losses.linear_loss], as a keyword of the constructor;
            None is `CrossEntropy()`.

    Returns:
        From `compute_loss`: the loss, and the model's outputs are replaced by the loss alone.

    Raises:
        ValueError: `compute_metrics` is given, which needs all logits; or `label_smoothing_factor`, which belongs to
            the row loss.

    Numerics:
        With gradient accumulation the denominator is that of the whole step, so the gradient is that of one batch.

    Source:
        transformers' documentation of `Trainer.compute_loss`.

    Example:
        >>> from transformers import Trainer
        >>> from danlu.integrations.transformers_linear import LinearLossMixin
        >>> class Fused(LinearLossMixin, Trainer):
        ...     pass
        >>> Fused.__mro__[1].__name__
        'LinearLossMixin'
    """

    def __init__(self, *args: Any, row_loss: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_metrics is not None:
            raise ValueError("compute_metrics needs the logits of all positions, which this loss exists to avoid")
        if self.label_smoother is not None:
            raise ValueError("label_smoothing_factor has no effect here; give label_smoothing to the row loss")
        self.row_loss = CrossEntropy() if row_loss is None else row_loss
        # What makes the Trainer count labels, and not divide once more.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The fused loss."""
        given = dict(inputs)
        found = fused_causal_lm_loss(
            model,
            given.pop("input_ids", None),
            given.pop("attention_mask", None),
            given.pop("labels", None),
            loss=self.row_loss,
            num_items_in_batch=num_items_in_batch,
            **given,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is that of all processes, over which DDP averages.
            found = found * self.accelerator.num_processes
        return (found, {"loss": found}) if return_outputs else found
