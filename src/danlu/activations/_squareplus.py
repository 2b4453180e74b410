r"""SquarePlus: ReLU smoothed by a square root instead of exponentials.

Source: Barron (2021), "Squareplus: A Softplus-Like Algebraic Rectifier", arXiv 2112.11687;
"SquarePlus:可能是运算最简单的ReLU光滑近似" (2021-12-29).

Shape letters: `...` any axes.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu import kernels
from danlu._common.checks import check_choice, check_floating, check_real, check_same_device, is_low_precision
from danlu.kernels.squareplus import squareplus_backward, squareplus_forward, squareplus_forward_

__all__ = ["SquarePlus", "squareplus"]

Implementation = Literal["auto", "reference", "cpp"]
Preset = Literal["softplus", "softplus_upper"]

# The minimax fit to softplus, error 0.0759314; and 4 ln^2 2, the smallest b that is nowhere below softplus.
_PRESETS: dict[str, float] = {"softplus": 1.5238210, "softplus_upper": 4 * math.log(2.0) ** 2}
# From here on sqrt(x^2 + b) is |x| in float64 for every b that is allowed, and squares below it are finite in float32.
_FAR = 2.0**60
_LARGEST_B = 1e20
# Below it a quarter of b may vanish in float32.
_SMALL_B = 1e-30
# b / 4 is at least this where the derivatives divide by its sum with a square, which may vanish.
# kernels/cpu/squareplus.cpp has the same.
_LEAST_SQUARES = {torch.float32: 1e-30, torch.float64: 1e-290}


def squareplus(
    input: Tensor,
    b: float | Preset | Tensor = 4.0,
    *,
    inplace: bool = False,
    impl: Implementation = "auto",
) -> Tensor:
    r"""SquarePlus, a smooth, monotone and convex function above ReLU.

    Definition:
        $$y = \frac{x + \sqrt{x^2 + b}}{2}, \qquad
        y' = \frac12\Big(1 + \frac{x}{\sqrt{x^2+b}}\Big) = \frac{y^2}{y^2 + b/4}, \qquad
        \frac{\partial y}{\partial b} = \frac{y}{4y^2 + b}$$
        with $x$ = `input`. $y(0) = \sqrt b/2$ is the largest distance to ReLU, $y(x)\,y(-x) = b/4$,
        $y(x) - y(-x) = x$, and the inverse is $x = y - b/(4y)$.

    Args:
        input: shape `(...)`, floating.
        b: $b \in [0, 10^{20}]$, a number, a tensor with one element, which may require a gradient, or a preset:
            "softplus" is 1.5238210, the best fit to softplus (error 0.076 everywhere); "softplus_upper" is $4\ln^2 2$,
            the smallest that is nowhere below softplus. The default 4 has the curvature of softplus at 0; 0 is ReLU.
        inplace: overwrite `input` with the result.
        impl: "cpp" is one pass of compiled code on the CPU, also for the derivative; "reference" is operations of
            torch, which `torch.compile` fuses with their neighbors; "auto" takes "cpp" where it can run and nothing
            is being compiled.

    Returns:
        Shape, dtype and strides of `input`; `input` itself with `inplace`.

    Raises:
        TypeError: `input` or a tensor `b` is not floating, or `b` is none of the above.
        ValueError: `b` is out of its range (for a tensor on the CPU only), has more than one element, or is on another
            device; an option is unknown.
        RuntimeError: `impl="cpp"` cannot run, with the reason; or `inplace` on a leaf that requires a gradient.

    Numerics:
        As $\max(x, 0) + y(-\lvert x\rvert)$, and the latter as a quotient: the definition cancels for $x < 0$, with
        relative errors above 4.4 and results of 0 from $-5800$ on in float32. Exact to two units in the last place for
        every $x$, also where $x^2$ is infinite, and for $b = 0$ or $b \ge 10^{-30}$ also where it vanishes;
        $y(-\infty) = 0$, $y(\infty) = \infty$, NaN stays. Half inputs are computed in float32. Where the result is 0
        both derivatives are 0, as for ReLU at 0. All derivatives are right to any order; in them a positive or a
        tensor `b` is at least $4\cdot10^{-30}$ (in float64 $4\cdot10^{-290}$).

    Cost:
        One pass forward, one backward, and one saved tensor, the output, which the next layer keeps anyway.

    Differences:
        `jax.nn.squareplus` and `keras.activations.squareplus` compute the definition as it stands.

    Source:
        Barron (2021), arXiv 2112.11687, equation 1; "SquarePlus:可能是运算最简单的ReLU光滑近似" (2021-12-29). The
        derivatives from the output are own derivations, checked in the tests.

    Example:
        >>> import torch
        >>> from danlu.activations import squareplus
        >>> squareplus(torch.tensor([-1e4, -1.5, 0.0, 1.5]))
        tensor([1.0000e-04, 5.0000e-01, 1.0000e+00, 2.0000e+00])
    """
    check_floating("input", input)
    amount = _check_b(b, input)
    check_choice("impl", impl, ("auto", "reference", "cpp"))
    kernel = _takes_kernel(input, amount, impl)
    compiling = torch.compiler.is_compiling()
    if inplace and not compiling and _has_address(input):
        return _InPlace.apply(input, amount, kernel)
    output = (_Traced if compiling else _SquarePlus).apply(input, amount, kernel)
    # A compiler writes no copy; transforms have no memory to write to.
    return input.copy_(output) if inplace else output


class SquarePlus(nn.Module):
    r"""Module form of [`squareplus`][danlu.activations.squareplus], with $b$ fixed or learned.

    Definition:
        `forward(input) = squareplus(input, b)`. With `learnable` it is $b = \log(1 + e^{\beta})$ with a parameter
        $\beta$ = `raw`, shape `()`, that starts where $b$ has the given value.

    Args:
        b: as in the function, a number or a preset; positive if it is learned.
        learnable: whether $b$ is a parameter.
        inplace: as there.
        impl: as there.

    Returns:
        From `forward`: shape and dtype of its input.

    Raises:
        TypeError: as in the function.
        ValueError: as there, or `b` is 0 and learned.

    Numerics:
        As in the function.

    Source:
        As in the function.

    Example:
        >>> import torch
        >>> from danlu.activations import SquarePlus
        >>> SquarePlus("softplus", learnable=True)
        SquarePlus(b=1.52382, learnable=True)
    """

    def __init__(
        self,
        b: float | Preset = 4.0,
        *,
        learnable: bool = False,
        inplace: bool = False,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        if isinstance(b, Tensor):
            raise TypeError("b must be a number or a preset, got a torch.Tensor; a learned b is learnable=True")
        number = _number(b)
        check_choice("impl", impl, ("auto", "reference", "cpp"))
        self.inplace = inplace
        self.impl: Implementation = impl
        self.raw: nn.Parameter | None = None
        self._fixed = number
        if learnable:
            if not number:
                raise ValueError("b must be positive to be learned, got 0")
            # The inverse of softplus, without overflow for large b.
            self.raw = nn.Parameter(torch.tensor(number + math.log(-math.expm1(-number))))

    @property
    def b(self) -> float | Tensor:
        """The number, or the tensor that is learned."""
        if self.raw is None:
            return self._fixed
        return F.softplus(self.raw.float() if is_low_precision(self.raw.dtype) else self.raw)

    def forward(self, input: Tensor) -> Tensor:
        """Return the activations."""
        return squareplus(input, self.b, inplace=self.inplace, impl=self.impl)

    def extra_repr(self) -> str:
        """Options as they stand in `repr`."""
        words = [f"b={float(torch.as_tensor(self.b).detach()):.6g}"]
        words += ["learnable=True"] if self.raw is not None else []
        words += ["inplace=True"] if self.inplace else []
        words += [f"impl={self.impl!r}"] if self.impl != "auto" else []
        return ", ".join(words)


def _number(b: object) -> float:
    if isinstance(b, str):
        check_choice("b", b, tuple(_PRESETS))
        return _PRESETS[b]
    return check_real("b", b, low=0.0, high=_LARGEST_B)


def _check_b(b: float | str | Tensor, input: Tensor) -> float | Tensor:
    if not isinstance(b, Tensor):
        return _number(b)
    check_floating("b", b)
    if b.numel() != 1:
        raise ValueError(f"b must be a number or a tensor with one element, got shape {tuple(b.shape)}")
    check_same_device(input=input, b=b)
    if b.device.type == "cpu" and not torch.compiler.is_compiling() and _has_address(b):
        _number(float(b.detach()))
    return b.reshape(())


def _has_address(tensor: Tensor) -> bool:
    """Whether there is memory behind the tensor: not if it stands for others, under a transform or a subclass."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _takes_kernel(input: Tensor, b: float | Tensor, impl: Implementation) -> bool:
    if impl == "reference":
        return False
    if torch.compiler.is_compiling():
        return impl == "cpp"
    known = _has_address(input) and (not isinstance(b, Tensor) or _has_address(b))
    why = kernels.explain("squareplus", input) if known else "there is no memory behind the tensors"
    if why is not None and impl == "cpp":
        raise RuntimeError(f"impl='cpp', but the kernel cannot run: {why}")
    return why is None


def _values(input: Tensor, b: float | Tensor) -> Tensor:
    x = input.float() if is_low_precision(input.dtype) else input
    if not isinstance(b, Tensor) and not b:
        return torch.where(x < 0, 0.0, x.abs()).to(input.dtype)
    # ReLU and what is above it, which is the value at -|x|: no difference of large numbers, and one division for both.
    # Without an argument's memory: in place on what is new, since large temporaries cost more than the arithmetic.
    if isinstance(b, Tensor) or b < _SMALL_B:
        magnitude = x.abs()
        square = magnitude * magnitude
        root = (square + b.to(square.dtype) if isinstance(b, Tensor) else square.add_(b)).sqrt_()
        root = torch.where(magnitude < _FAR, root, magnitude).mul_(0.5).add_(magnitude, alpha=0.5)
        above = b / root.clamp_(min=torch.finfo(root.dtype).tiny) * 0.25
    else:
        # With half of |x| the sum cannot overflow.
        magnitude = x.mul(0.5).abs_()
        square = magnitude * magnitude
        root = torch.where(magnitude < _FAR, square.add_(0.25 * b).sqrt_(), magnitude)
        # A number over a tensor would become a reciprocal and a product.
        above = x.new_full((), 0.25 * b) / root.add_(magnitude)
    return (above + x.relu()).to(input.dtype)


def _slopes(output: Tensor, b: float | Tensor, *, in_b: bool) -> tuple[Tensor, Tensor | None]:
    """The derivatives in the input and, if asked, in b, as differentiable functions of the output and of b."""
    y = output.float() if is_low_precision(output.dtype) else output
    flat = y == 0
    near = y.masked_fill(flat, 1.0).clamp(max=_FAR)
    if not isinstance(b, Tensor) and not b:
        # That of ReLU is 1 also where squares vanish; NaN stays.
        return (0.0 * near + 1.0).masked_fill(flat, 0.0), None
    square = near.square()
    least = _LEAST_SQUARES[y.dtype]
    quarter = (0.25 * b.to(y.dtype)).clamp(min=least) if isinstance(b, Tensor) else max(0.25 * b, least)
    # Divided, not multiplied by an inverse, whose own derivatives overflow for small b.
    total = square + quarter
    by_b = (0.25 * near / total).masked_fill(flat, 0.0) if in_b else None
    return (square / total).masked_fill(flat, 0.0), by_b


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    output, *rest = ctx.saved_tensors
    b: float | Tensor = rest[0] if rest else ctx.b
    needs_b = bool(rest) and ctx.needs_input_grad[1]
    # With create_graph, and under transforms, the derivative is differentiated in turn: by the formula. Compiled code
    # has no second derivative.
    if ctx.kernel and (torch.compiler.is_compiling() or (not torch.is_grad_enabled() and _has_address(grad))):
        d_input, d_b = squareplus_backward(grad, output, b)
        return d_input, d_b.to(rest[0].dtype) if needs_b else None, None
    by_input, by_b = _slopes(output, b, in_b=needs_b)
    d_input = (grad.to(by_input.dtype) * by_input).to(grad.dtype)
    return d_input, None if by_b is None else (grad.to(by_b.dtype) * by_b).sum().to(rest[0].dtype), None


def _keep(ctx: Any, inputs: tuple[Tensor, float | Tensor, bool], output: Tensor) -> None:
    _, b, ctx.kernel = inputs
    saved = (output, b) if isinstance(b, Tensor) else (output,)
    ctx.b = None if isinstance(b, Tensor) else b
    ctx.save_for_backward(*saved)


class _SquarePlus(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, b: float | Tensor, kernel: bool) -> Tensor:  # pyrefly: ignore[bad-override]
        return squareplus_forward(input, b) if kernel else _values(input, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | Tensor, bool], output: Tensor) -> None:
        _keep(ctx, inputs, output)
        ctx.save_for_forward(*((output, inputs[1]) if isinstance(inputs[1], Tensor) else (output,)))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return _gradients(ctx, grad_outputs[0])

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        output, *rest = ctx.saved_tensors
        d_input, d_b, _ = grad_inputs
        by_input, by_b = _slopes(output, rest[0] if rest else ctx.b, in_b=d_b is not None)
        change = torch.zeros_like(by_input) if d_input is None else d_input.to(by_input.dtype) * by_input
        if by_b is not None:
            change = change + d_b.to(by_b.dtype) * by_b
        return change.to(output.dtype)


class _Traced(torch.autograd.Function):
    """The same without forward mode, which a compiler does not trace."""

    @staticmethod
    def forward(input: Tensor, b: float | Tensor, kernel: bool) -> Tensor:  # pyrefly: ignore[bad-override]
        return squareplus_forward(input, b) if kernel else _values(input, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | Tensor, bool], output: Tensor) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return _gradients(ctx, grad_outputs[0])


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, input: Tensor, b: float | Tensor, kernel: bool
    ) -> Tensor:
        if kernel and input.is_contiguous():
            squareplus_forward_(input, b)
        else:
            input.copy_(squareplus_forward(input, b) if kernel else _values(input, b))
        ctx.mark_dirty(input)
        _keep(ctx, (input, b, kernel), input)
        return input

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return _gradients(ctx, grad_outputs[0])
