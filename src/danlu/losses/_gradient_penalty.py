r"""Gradient penalties: the squared norm of a loss's gradient, in its inputs or parameters, as a term of the loss.

Source: "输入梯度惩罚与参数梯度惩罚的一个不等式" (2021-12-11); Barrett and Dherin (2020), "Implicit Gradient
Regularization", arXiv 2009.11162.

Shape letters: `B` samples; `...` the axes of one sample.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from danlu._common.checks import check_choice, check_floating, check_integer, check_real, is_low_precision
from danlu._common.reduction import Reduction
from danlu.losses._ghost_norms import per_sample_squared_norms
from danlu.losses._second_gradients import (
    PreparedGradients,
    Replay,
    ShiftedParameters,
    check_finite_difference,
    check_not_sharded,
    differentiable_gradients,
    full_precision,
    global_norm,
    gradients_of_mean,
    is_sharded,
)

__all__ = ["GradientPenalty", "input_gradient_penalty", "parameter_gradient_penalty"]

Method = Literal["double_backward", "finite_difference"]
Scope = Literal["batch", "per_sample"]
Restore = Literal["copy", "subtract"]


def input_gradient_penalty(loss: Tensor, inputs: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Squared norm of the gradient of every sample's loss in its input.

    Definition:
        $$R_x = \frac1B \sum_i \|\nabla_{x_i} \ell_i\|^2$$
        with $\ell_i$ = `loss[i]` and $x_i$ = `inputs[i]`. A scalar `loss` is taken as the mean of the $\ell_i$.

    Args:
        loss: $\ell$ with its graph, shape `(B,)`, or the mean of it, a scalar. Sample $i$ must depend on no other
            input than $x_i$ (BatchNorm in training mixes them).
        inputs: $x$, shape `(B, ...)`, floating, the very tensor from which `loss` was computed, and it requires a
            gradient. For token models this is the output of the embedding.
        reduction: "mean" over the samples, "sum", or "none" for one value per sample.

    Returns:
        A scalar, or shape `(B,)` with "none", with a graph to inputs and parameters; float32 for half inputs, else
        dtype of the gradient. Add it to the loss with a weight.

    Raises:
        TypeError: `loss` or `inputs` is not floating; indices have no gradient.
        ValueError: `inputs` requires no gradient, `loss` does not depend on it or has another shape, an unknown
            reduction, or float16: its gradients underflow and their derivatives overflow.
        RuntimeError: the model has no second derivative (fused attention, `torch.compile`, sharded parameters), or an
            in-place operation destroyed it. The message names the remedy.

    Numerics:
        Squares are summed in float32 for half gradients. With a gradient scaler give the unscaled loss, and scale the
        sum of loss and penalty. A gradient of 0 gives a penalty of 0 with gradient 0.

    Cost:
        One backward pass to the inputs, and a second derivative in the backward pass of the sum: together 2 to 2.5
        plain steps in time, and the graph of the gradient in memory.

    Source:
        "输入梯度惩罚与参数梯度惩罚的一个不等式" (2021-12-11).

    Example:
        >>> import torch
        >>> from danlu.losses import input_gradient_penalty
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        >>> input_gradient_penalty(x.square().sum(1), x, reduction="none").tolist()
        [20.0, 100.0]
    """
    check_floating("loss", loss)
    if isinstance(inputs, Tensor) and not inputs.is_floating_point():
        raise TypeError(
            f"inputs must be a floating-point tensor, got dtype {inputs.dtype}; for a token model give the output of "
            "its embedding"
        )
    check_floating("inputs", inputs)
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    if not inputs.requires_grad:
        raise ValueError("inputs must require a gradient: call inputs.requires_grad_() before the loss is computed")
    if inputs.ndim < 1 or loss.ndim > 1 or (loss.ndim == 1 and loss.shape[0] != inputs.shape[0]):
        raise ValueError(
            "loss must hold one value per sample or be their mean, "
            f"got loss {tuple(loss.shape)} and inputs {tuple(inputs.shape)}"
        )
    _check_not_float16(loss, inputs.dtype)
    grad = differentiable_gradients(loss, [inputs])[0]
    if grad is None:
        raise ValueError(
            "loss does not depend on inputs: compute it from this very tensor, without a copy or an in-place change "
            "in between"
        )
    # The gradient of a mean is that of a sample over their number.
    norms = _square_sum(grad) * (1 if loss.ndim else inputs.shape[0] ** 2)
    return norms if reduction == "none" else norms.mean() if reduction == "mean" else norms.sum()


def parameter_gradient_penalty(
    loss: Tensor | Callable[[], Tensor],
    model: nn.Module,
    *,
    method: Method = "double_backward",
    scope: Scope = "batch",
    radius: float = 1e-2,
    central: bool = False,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    r"""Squared norm of the loss's gradient in the parameters, of the batch or of every sample.

    Definition:
        With $\theta$ the trainable parameters of `model`, $\ell_i$ the losses of the samples and
        $L = \frac1B \sum_i \ell_i$,
        $$R_\text{batch} = \|\nabla_\theta L\|^2, \qquad
        R_\text{per sample} = \frac1B \sum_i \|\nabla_\theta \ell_i\|^2$$
        `method="finite_difference"` replaces the gradient of the first, $2 \nabla^2 L\, g$ with $g = \nabla_\theta L$,
        by $2\|g\|\,[\nabla L(\theta + r g/\|g\|) - g]/r$, or with `central` by
        $\|g\|\,[\nabla L(\theta + r g/\|g\|) - \nabla L(\theta - r g/\|g\|)]/r$, with $r$ = `radius`.
        Per sample, a linear layer with inputs $h_t$ and output gradients $\delta_t$ contributes
        $\|\sum_t \delta_t h_t^\top\|^2 = \sum_{t,s} (\delta_t\cdot\delta_s)(h_t\cdot h_s)$, which for one position is
        $\|\delta\|^2\|h\|^2$, and its bias $\|\sum_t \delta_t\|^2$.

    Args:
        loss: a function without arguments that computes $\ell$, shape `(B,)`, or $L$, a scalar. For double backward
            of a batch it may also be the tensor itself, with its graph.
        model: whose parameters are meant, and whose buffers are guarded. A part of the model penalizes that part.
        method: "double_backward" is exact. "finite_difference" needs one more forward and backward pass but no second
            derivative, so it works with fused attention and `torch.compile`.
        scope: "batch", or "per_sample" (exact; layers may be Linear, Embedding, LayerNorm and RMSNorm; the samples
            are the first axis of every layer's input, and do not interact). Only the second bounds the input gradients
            of the samples: see [`gradient_penalty_bound`][danlu.diagnostics.gradient_penalty_bound].
        radius: $r > 0$, the length of the step in all parameters together; for finite differences only.
        central: a third pass makes the error $O(r^2)$ instead of $O(r)$; for finite differences only.
        reduction: over the samples, for the scope "per_sample" only: "mean", "sum", or "none" for shape `(B,)`.

    Returns:
        The mean loss and the penalty, scalars: train on `loss + weight * penalty`. With finite differences both know
        their gradients in the parameters of `model` already, and have none in anything else.

    Raises:
        TypeError: `loss` is a tensor where a function is needed.
        ValueError: an option is out of its range or has no effect with the others; `model` has no trainable parameters;
            a layer is not supported per sample (unknown kind, tied parameters, BatchNorm in training); parameters are
            sharded (DTensor), which only finite differences support, or float16 or bfloat16, which they do not;
            `loss` is a tensor in float16, or given inside autocast to it.
        RuntimeError: the model has no second derivative, an in-place operation destroyed it, or parameters were used
            outside of the modules that own them. The message names the remedy.

    Numerics:
        A gradient of 0 gives a penalty of 0 with gradient 0. Inside autocast to float16 the loss is computed in
        float32. The passes of a finite difference draw the same random numbers (dropout), and the generators and
        buffers (statistics of BatchNorm) end as after one pass. Its relative error was 7.0e-3 at $r = 0.01$ and
        7.0e-4 at 0.001 on a small MLP, central 4.7e-5 and 4.7e-7, in float64; float32 rounds at about $10^{-7}/r$, and
        passes in bfloat16 need a larger radius.

    Cost:
        In plain steps, by matrix products: double backward 3, finite difference 2 (central 3), per sample 2, and for
        $T > 1$ positions $T(1/D_\text{in} + 1/D_\text{out})$ per linear layer more. Finite differences hold
        up to three parameter-sized tensors beside the activations; fewer in
        [`GradientPenalty`][danlu.losses.GradientPenalty]. Per sample and layer the smaller of $T^2$ and
        $D_\text{in} D_\text{out}$ numbers are held for $T > 1$ positions.

    Differences:
        The batch is what `loss` computes: one micro-batch of one process.

    Source:
        "输入梯度惩罚与参数梯度惩罚的一个不等式" (2021-12-11); Barrett and Dherin (2020), arXiv 2009.11162.

    Example:
        >>> import torch
        >>> from danlu.losses import parameter_gradient_penalty
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
        >>> loss, penalty = parameter_gradient_penalty(lambda: model(x).sum(1), model, scope="per_sample")
        >>> penalty.item()
        25.0
    """
    _check_parameter_options(method, scope, radius, central)
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    if reduction != "mean" and scope == "batch":
        raise ValueError(f"reduction={reduction!r} has no meaning with scope='batch', which gives one number")
    params = _trainable(model)
    if scope == "batch" and method == "double_backward":
        check_not_sharded(params)
        if isinstance(loss, Tensor):
            check_floating("loss", loss)
            _check_not_float16(loss)
            return loss.mean(), _batch_penalty(loss.mean(), params)
    if not callable(loss) or isinstance(loss, nn.Module):
        raise TypeError(
            f"loss must be a function without arguments for method={method!r}, scope={scope!r}, "
            f"got {type(loss).__name__}"
        )
    if method == "finite_difference":
        with full_precision(params[0].device):
            value, penalty, _ = _finite_difference(loss, model, params, radius, central, keep_graph=False)
        return value, penalty
    with full_precision(params[0].device):
        losses, penalty = _exact(loss, model, params, scope)
    if reduction != "none" and penalty.ndim:
        penalty = penalty.mean() if reduction == "mean" else penalty.sum()
    return losses.mean(), penalty


class GradientPenalty:
    r"""Gradient penalties for a training loop: weights, schedule, and a backward pass that needs little memory.

    Definition:
        The step $t = 0, 1, \dots$ minimizes
        $$L + w_t\,(\lambda R_x + \mu R_\theta), \qquad
        w_t = k\,\min\bigl(1, \tfrac{t+1}{n}\bigr)\ \text{if } k \text{ divides } t \text{, else } 0$$
        with $\lambda$ = `input` times [`input_gradient_penalty`][danlu.losses.input_gradient_penalty], $\mu$ =
        `parameter` times [`parameter_gradient_penalty`][danlu.losses.parameter_gradient_penalty], $k$ = `every` and
        $n$ = `warmup`; the minimum is 1 for $n = 0$.

    Args:
        model: whose parameters the penalty of $\mu$ means.
        input: $\lambda \ge 0$.
        parameter: $\mu \ge 0$.
        method: as in `parameter_gradient_penalty`.
        scope: as there.
        radius: as there.
        central: as there.
        every: $k \ge 1$; the penalties are evaluated in each k-th step, k times as strong.
        warmup: $n \ge 0$ steps over which the weights rise linearly.

    Raises:
        TypeError: an option is not of its type.
        ValueError: an option is out of its range or has no effect with the others.

    Numerics:
        As in the functions. With a gradient scaler call the object and scale its result; `backward` does not scale.
        Under DDP and FSDP2 `backward` penalizes the gradient of the global batch, a call that of the local one.

    Cost:
        As in the functions. `backward` with finite differences holds two parameter-sized tensors beside the
        activations of its second pass, the gradient and a copy of the parameters, and with `restore="subtract"` one.
        Gradients that are not None before it are one more.

    Differences:
        Takes the model and not an optimizer: an optimizer does not know the buffers that the second pass must not
        change. `penalty.backward` leaves parameters and their gradients only; other leaves get the plain gradient.

    Source:
        As in the functions.

    Example:
        >>> import torch
        >>> from danlu.losses import GradientPenalty
        >>> model, x = torch.nn.Linear(2, 1), torch.randn(8, 2)
        >>> penalty = GradientPenalty(model, parameter=0.1, method="finite_difference")
        >>> loss = penalty.backward(lambda: model(x).square().mean())
        >>> model.weight.grad.shape, list(penalty.values)
        (torch.Size([1, 2]), ['parameter'])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input: float = 0.0,
        parameter: float = 0.0,
        method: Method = "double_backward",
        scope: Scope = "batch",
        radius: float = 1e-2,
        central: bool = False,
        every: int = 1,
        warmup: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, whose buffers the penalty guards, got {type(model).__name__}"
            )
        self.model = model
        self.input = check_real("input", input, low=0.0)
        self.parameter = check_real("parameter", parameter, low=0.0)
        _check_parameter_options(method, scope, radius, central)
        self.method: Method = method
        self.scope: Scope = scope
        self.radius = radius
        self.central = central
        self.every = check_integer("every", every, low=1)
        self.warmup = check_integer("warmup", warmup, low=0)
        self.step = 0
        # The penalties of the last step that had some, without their weights; for logs.
        self.values: dict[str, Tensor] = {}

    def weights(self, step: int) -> tuple[float, float]:
        r"""The weights $w_t\lambda$ and $w_t\mu$ of a step."""
        if step % self.every:
            return 0.0, 0.0
        factor = self.every * (min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)
        return factor * self.input, factor * self.parameter

    def __call__(
        self, loss: Callable[[], Tensor], inputs: Tensor | None = None, *, step: int | None = None, scale: float = 1.0
    ) -> Tensor:
        """The mean loss plus the weighted penalties.

        Args:
            loss: as in `parameter_gradient_penalty`; it computes from `inputs` where an input penalty is wanted.
            inputs: as in `input_gradient_penalty`.
            step: the step $t$; None counts the calls.
            scale: factor on the penalties. A loss that was divided by the number of micro-batches has penalties
                divided by its square, so give that number here.
        """
        on_input, on_parameter = (scale * weight for weight in self._begin(loss, inputs, step))
        if not on_input and not on_parameter:
            return loss().mean()
        params = _trainable(self.model)
        with full_precision(params[0].device):
            if on_parameter and self.method == "finite_difference":
                total, penalty, losses = _finite_difference(
                    loss, self.model, params, self.radius, self.central, keep_graph=on_input > 0
                )
            elif on_parameter:
                losses, penalty = _exact(loss, self.model, params, self.scope)
                total, penalty = losses.mean(), penalty.mean()
            else:
                losses, penalty = loss(), None
                total = losses.mean()
            self.values = {}
            if penalty is not None:
                self.values["parameter"] = penalty.detach()
                total = total + on_parameter * penalty
            if on_input and inputs is not None:
                penalty = input_gradient_penalty(losses, inputs)
                self.values["input"] = penalty.detach()
                total = total + on_input * penalty
        return total

    def backward(
        self,
        loss: Callable[[], Tensor],
        inputs: Tensor | None = None,
        *,
        step: int | None = None,
        restore: Restore = "copy",
    ) -> Tensor:
        """Add the gradients of the mean loss and of the weighted penalties to `grad`; return the mean loss.

        Args:
            loss: as in a call.
            inputs: as in a call.
            step: as in a call.
            restore: how the parameters come back from the step of a finite difference: "copy" is exact; "subtract"
                saves the copy, and leaves rounding errors of about one unit in the last place.
        """
        check_choice("restore", restore, ("copy", "subtract"))
        if restore == "subtract" and self.method != "finite_difference":
            raise ValueError("restore='subtract' has no meaning with method='double_backward', which moves nothing")
        if restore == "subtract" and self.input:
            raise ValueError("restore='subtract' has no meaning with an input penalty, which needs the graph anyway")
        on_input, on_parameter = self.weights(self.step if step is None else step)
        if on_input or not on_parameter or self.method != "finite_difference":
            value: list[Tensor] = []

            def remembered() -> Tensor:
                losses = loss()
                value.append(losses.detach().mean())
                return losses

            self(remembered, inputs, step=step).backward()
            return value[0]
        self._begin(loss, inputs, step)
        params = _trainable(self.model)
        with full_precision(params[0].device):
            value_, penalty = _finite_difference_in_place(
                loss, self.model, params, on_parameter, self.radius, self.central, restore
            )
        self.values = {"parameter": penalty}
        return value_

    def state_dict(self) -> dict[str, int]:
        """The count of calls."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.step = check_integer("step", state_dict["step"], low=0)

    def __repr__(self) -> str:
        names = ("input", "parameter", "method", "scope", "radius", "central", "every", "warmup")
        return f"GradientPenalty({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def _begin(self, loss: Callable[[], Tensor], inputs: Tensor | None, step: int | None) -> tuple[float, float]:
        """Check the arguments, count the call and return the weights."""
        if not callable(loss) or isinstance(loss, Tensor):
            raise TypeError(f"loss must be a function without arguments, got {type(loss).__name__}")
        if self.input and inputs is None:
            raise ValueError("inputs must be given for an input penalty")
        if self.input and self.parameter and self.method == "finite_difference" and not _is_leaf(inputs):
            raise ValueError(
                "inputs must be a leaf when method='finite_difference' penalizes the parameters as well: its second "
                "pass would not see the change of what computed them; use method='double_backward'"
            )
        if step is None:
            step = self.step
            self.step += 1
        return self.weights(step)


def _trainable(model: nn.Module) -> list[Tensor]:
    """The trainable parameters of `model`; raise if there are none or one is not real."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise ValueError("model has no trainable parameters")
    for param in params:
        check_floating("every parameter of model", param)
    return params


def _is_leaf(inputs: Tensor | None) -> bool:
    return inputs is None or inputs.is_leaf


def _check_parameter_options(method: str, scope: str, radius: float, central: bool) -> None:
    check_choice("method", method, ("double_backward", "finite_difference"))
    check_choice("scope", scope, ("batch", "per_sample"))
    check_real("radius", radius, low=0.0, low_open=True)
    if not isinstance(central, bool):
        raise TypeError(f"central must be a bool, got {type(central).__name__}")
    if central and method != "finite_difference":
        raise ValueError("central=True has no meaning with method='double_backward', which is exact")
    if method == "finite_difference" and scope == "per_sample":
        raise ValueError(
            "method='finite_difference' gives the gradient of one number, so scope must be 'batch', got 'per_sample'"
        )


def _check_not_float16(loss: Tensor, *dtypes: torch.dtype) -> None:
    """Raise if a loss that is there already, or its graph, is likely to be float16."""
    kind = loss.device.type
    casting = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if casting or torch.float16 in (loss.dtype, *dtypes):
        raise ValueError(
            "float16 is too narrow for derivatives of gradients: compute the unscaled loss in float32 "
            "(torch.autocast(..., enabled=False)), or use bfloat16"
        )


def _square_sum(tensor: Tensor) -> Tensor:
    """Sum of squares over all axes but the first."""
    wide = tensor.float() if is_low_precision(tensor.dtype) else tensor
    return wide.reshape(len(wide), math.prod(wide.shape[1:])).square().sum(1)


def _batch_penalty(loss: Tensor, params: list[Tensor]) -> Tensor:
    grads = [grad for grad in differentiable_gradients(loss, params) if grad is not None]
    if not grads:
        raise ValueError("loss does not depend on the trainable parameters of model")
    squares = [_square_sum(grad.reshape(1, -1))[0] for grad in grads]
    return torch.stack([square.to(squares[0]) for square in squares]).sum()


def _exact(loss: Callable[[], Tensor], model: nn.Module, params: list[Tensor], scope: Scope) -> tuple[Tensor, Tensor]:
    """Losses and penalty by double backward."""
    check_not_sharded(params)
    if scope == "per_sample":
        return per_sample_squared_norms(loss, model)
    losses = loss()
    return losses, _batch_penalty(losses.mean(), params)


def _finite_difference(
    loss: Callable[[], Tensor],
    model: nn.Module,
    params: list[Tensor],
    radius: float,
    central: bool,
    *,
    keep_graph: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss and penalty that know their gradients, and the losses themselves."""
    check_finite_difference(params)
    replay = Replay(model, params)
    losses = loss()
    value, found = gradients_of_mean(losses, params, keep_graph=keep_graph)
    replay.first_pass_is_over()
    used = [param for param, grad in zip(params, found, strict=True) if grad is not None]
    grads = [grad.detach() for grad in found if grad is not None]
    if not grads:
        raise ValueError("loss does not depend on the trainable parameters of model")
    norm = global_norm(grads)
    length = torch.where(norm > 0, radius / norm, 0.0)
    point = ShiftedParameters(used)

    def shifted(sign: int) -> list[Tensor]:
        with point.moved(grads, sign * length), replay.again():
            _, there = gradients_of_mean(loss(), used, keep_graph=False)
        return [torch.zeros_like(grad) if other is None else other for grad, other in zip(grads, there, strict=True)]

    ahead = shifted(1)
    behind = shifted(-1) if central else grads
    factor = (1 if central else 2) * norm / radius
    slopes = [(a - b).mul_(factor.to(a.dtype)) for a, b in zip(ahead, behind, strict=True)]
    outputs = PreparedGradients.apply(value, norm.square(), grads, slopes, *used)
    return outputs[0], outputs[1], losses


def _finite_difference_in_place(
    loss: Callable[[], Tensor],
    model: nn.Module,
    params: list[Tensor],
    weight: float,
    radius: float,
    central: bool,
    restore: Restore,
) -> tuple[Tensor, Tensor]:
    r"""Add $(1-c)\,g + c\,\nabla L(\theta + r g/\|g\|)$ with $c = 2\mu\|g\|/r$ to `grad`; mean loss and penalty.

    Nothing is held for long but the first gradient and, to restore them exactly, a copy of the parameters.
    """
    check_finite_difference(params)
    before = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        replay = Replay(model, params)
        value = loss().mean()
        value.backward()
        replay.first_pass_is_over()
        used = [param for param in params if param.grad is not None]
        grads = [param.grad for param in used if param.grad is not None]
        if not grads:
            raise ValueError("loss does not depend on the trainable parameters of model")
        norm = global_norm(grads)
        length = torch.where(norm > 0, radius / norm, 0.0)
        factor = (1 if central else 2) * weight * norm / radius
        # A sharded model must run its whole backward pass; otherwise the second one is for the parameters alone.
        only = None if any(is_sharded(param) for param in used) else used
        point = ShiftedParameters(used, exact=restore == "copy")
        for param in used:
            param.grad = None
        for sign in (1, -1) if central else (1,):
            with point.moved(grads, sign * length), replay.again():
                there = loss().mean()
                there.backward(gradient=(sign * factor).to(there), inputs=only)
        rest = torch.ones_like(factor) if central else 1 - factor
        for param, grad in zip(used, grads, strict=True):
            grad.mul_(rest.to(grad.dtype))
            param.grad = grad if param.grad is None else param.grad.add_(grad)
    finally:
        for param, old in zip(params, before, strict=True):
            if old is not None:
                param.grad = old if param.grad is None else old.add_(param.grad)
    return value.detach(), norm.square()
