"""transformers: gradient penalties in its Trainer, or in any subclass of it."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from danlu.losses import GradientPenalty

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

__all__ = ["GradientPenaltyMixin"]


class GradientPenaltyMixin(_Trainer):
    r"""A Trainer whose loss has gradient penalties: `class Penalized(GradientPenaltyMixin, Trainer): pass`.

    Definition:
        In training, `compute_loss` is
        $$L + w_t\,(\lambda R_x + \mu R_\theta)$$
        of [`GradientPenalty`][danlu.losses.GradientPenalty] with $t$ the Trainer's global step, $L$ the Trainer's own
        loss, of whatever kind, and $x$ the output of the model's input embedding, or the floating-point model input
        named `inputs`. Sample $i$ has the loss $\ell_i$ = the number of samples times its contribution to $L$.
        In evaluation it is $L$.

    Args:
        gradient_penalty: a `GradientPenalty` of the model, or of a part of it, as a keyword of the constructor.
        inputs: name of the model input that the input penalty differentiates. "input_ids" stands for its embedding,
            which the model then gets as `inputs_embeds`; "pixel_values" is one for images.

    Returns:
        From `compute_loss`: the loss, and the outputs if they are asked for.

    Raises:
        TypeError: `gradient_penalty` is not a `GradientPenalty`, or there is no embedding to take.
        ValueError: mixed precision in float16, whose gradients are too narrow for penalties; more than one GPU in one
            process; or the model input is missing.

    Numerics:
        With gradient accumulation the penalty is the mean of those of the micro-batches, each of its own mean loss, if
        they have equally many items; otherwise their shares are weighed with the square of their number of items.
        Under DDP it is the mean of those of the processes.

    Cost:
        As in [`GradientPenalty`][danlu.losses.GradientPenalty], for calls.

    Differences:
        No callback: the schedule follows `state.global_step`, so it resumes with the Trainer and counts optimizer
        steps, not micro-batches. Losses reported in training include the penalties.

    Source:
        transformers' documentation of `Trainer.compute_loss`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer
        >>> from danlu.integrations.transformers_penalty import GradientPenaltyMixin
        >>> class Penalized(GradientPenaltyMixin, Trainer):
        ...     pass
        >>> Penalized.__mro__[1].__name__
        'GradientPenaltyMixin'
    """

    def __init__(self, *args: Any, gradient_penalty: GradientPenalty, inputs: str = "input_ids", **kwargs: Any) -> None:
        if not isinstance(gradient_penalty, GradientPenalty):
            raise TypeError(f"gradient_penalty must be a GradientPenalty, got {type(gradient_penalty).__name__}")
        if not isinstance(inputs, str):
            raise TypeError(f"inputs must be the name of a model input, got {type(inputs).__name__}")
        super().__init__(*args, **kwargs)
        if self.args.fp16:
            raise ValueError("gradient penalties do not work with fp16=True; use bf16=True or float32")
        if self.args.n_gpu > 1:
            raise ValueError("gradient penalties do not work with DataParallel; start one process per GPU")
        self.gradient_penalty = gradient_penalty
        self.gradient_penalty_inputs = inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The Trainer's loss, in training with the penalties."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        penalty, step = self.gradient_penalty, int(self.state.global_step)
        given = inputs
        differentiated: Tensor | None = None
        if penalty.weights(step)[0]:
            given, differentiated = self._differentiable(model, inputs)
        outputs: list[Any] = []

        def loss() -> Tensor:
            # A copy, since the Trainer takes the labels out of what it is given.
            found = super(GradientPenaltyMixin, self).compute_loss(model, dict(given), True, num_items_in_batch)
            outputs.append(found[1])
            return found[0]

        total = penalty(loss, differentiated, step=step, scale=self._micro_batches(num_items_in_batch))
        return (total, outputs[0]) if return_outputs else total

    def _micro_batches(self, num_items_in_batch: Any) -> float:
        """The factor by which the loss of a micro-batch was divided already."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = accepts or self.compute_loss_func is not None
        return float(getattr(self, "current_gradient_accumulation_steps", 1)) if scaled else 1.0

    def _differentiable(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Model inputs with what the input penalty differentiates, and that tensor."""
        name = self.gradient_penalty_inputs
        if name not in inputs:
            raise ValueError(f"the input penalty needs the model input {name!r}, got {', '.join(inputs)}")
        changed = dict(inputs)
        tensor: Tensor = changed.pop(name)
        if name == "input_ids":
            name = "inputs_embeds"
            inner = self.accelerator.unwrap_model(model)
            if not isinstance(inner, PreTrainedModel):
                raise TypeError(f"an input penalty on input_ids needs a transformers model, got {type(inner).__name__}")
            tensor = inner.get_input_embeddings()(tensor)
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        changed[name] = tensor
        return changed, tensor
