"""The rules of the audit: what an operation in half precision does wrong, seen from its arguments and its result.

Everything is judged from the numbers of one run, so a rule may read values; nothing here runs in training.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter

from danlu._common.checks import is_low_precision

__all__ = ["Hazards", "Kind", "Literals", "Severity"]

Severity = Literal["error", "warning", "info"]
Kind = Literal[
    "activation",
    "angle",
    "buffer",
    "constant",
    "eps",
    "log",
    "loss",
    "masked_row",
    "nonfinite",
    "norm",
    "parameter",
    "positions",
    "reduction",
    "softmax",
]
Report = Callable[[Kind, Severity, str, str], None]

_FILLS = frozenset({"fill", "fill_", "full", "full_like", "masked_fill", "masked_fill_", "new_full", "scalar_tensor"})
_ARITHMETIC = frozenset({"add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_"})
_CEILINGS = frozenset({"clamp", "clamp_", "clamp_max", "clamp_max_", "minimum"})
_FLOORS = frozenset({"add", "add_", "clamp", "clamp_", "clamp_min", "clamp_min_", "maximum"})
_NORMS = frozenset({"linalg_vector_norm", "norm", "rsqrt", "sqrt", "std", "std_mean", "var", "var_mean"})
_LOGS = frozenset({"log", "log_", "log2", "log10", "log1p", "logit"})
# Long recurrences and exponentials inside the kernel; a plain sum is judged by its error.
_SCANS = frozenset({"cumprod", "cumsum", "logcumsumexp", "logsumexp", "prod"})
_LOSSES = frozenset(
    {
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "huber_loss",
        "mse_loss",
        "nll_loss2d_forward",
        "nll_loss_forward",
        "smooth_l1_loss",
    }
)
# What makes large numbers of small ones.
_GROWING = frozenset(
    {
        "add",
        "add_",
        "addmm",
        "addmv",
        "baddbmm",
        "bmm",
        "convolution",
        "div",
        "div_",
        "dot",
        "exp",
        "mm",
        "mul",
        "mul_",
        "mv",
        "pow",
        "sum",
    }
)
# The same probabilities, or one less them, in another shape, place or dtype.
_SAME_VALUES = frozenset(
    {
        "_to_copy",
        "_unsafe_view",
        "add",
        "alias",
        "clamp",
        "clamp_min",
        "clone",
        "expand",
        "gather",
        "index",
        "index_select",
        "masked_fill",
        "permute",
        "reshape",
        "rsub",
        "select",
        "slice",
        "squeeze",
        "t",
        "transpose",
        "unsqueeze",
        "view",
    }
)
_UNINITIALIZED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


class Hazards(TorchDispatchMode):
    """Watches every operation, after autocast has had its say, and reports what is dangerous.

    Args:
        report: called with kind, severity, operation and message.
    """

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report
        # Tensors are held, so that no other one gets their id.
        self._half_probabilities: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and judge it."""
        kwargs = kwargs or {}
        name = str(func._schema.name).split("::")[-1]
        leaves, _ = tree_flatten((args, kwargs))
        inputs = [one for one in leaves if isinstance(one, Tensor) and one.is_floating_point()]
        numbers = [float(one) for one in leaves if isinstance(one, int | float) and not isinstance(one, bool)]
        # A tensor without axes takes part like a number: it does not decide the dtype of the result.
        wide = [one for one in inputs if one.ndim > 0] or inputs
        target = _result_dtype(wide, kwargs)
        if target is not None and is_low_precision(target):
            numbers += [float(one) for one in inputs if one.ndim == 0 and not is_low_precision(one.dtype)]
            args = self._constants(name, target, numbers, args)
        result = func(*args, **kwargs)
        outputs = [one for one in tree_iter(result) if isinstance(one, Tensor) and one.is_floating_point()]
        if outputs and name not in _UNINITIALIZED:
            self._judge(name, args, kwargs, inputs, outputs, numbers)
        return result

    def _constants(self, name: str, dtype: torch.dtype, numbers: Iterable[float], args: Any) -> Any:
        """Numbers that `dtype` cannot hold. Returns arguments with which the run can go on."""
        limit = torch.finfo(dtype).max
        label = _label(dtype)
        for number in numbers:
            if limit < abs(number) < float("inf") and (name in _FILLS or name in _ARITHMETIC or name == "where"):
                message = f"the constant {number:g} is beyond the range of {label} ({limit:g}); use mask_value(dtype)"
                self._report("constant", "error", name, message)
            elif (name in _FLOORS or name in _FILLS) and number != 0 and _rounded(number, dtype) == 0:
                self._report("eps", "error", name, f"the constant {number:g} rounds to 0 in {label}")
            elif name in _CEILINGS and 0 < 1 - number <= torch.finfo(dtype).eps / 4:
                self._report("eps", "error", name, f"the bound 1 - {1 - number:.3g} rounds to 1 in {label}")
        if name not in _FILLS:
            return args
        # torch refuses to fill with such a number, and the rest of the model is still to be seen.
        return tuple(
            max(-limit, min(limit, one)) if isinstance(one, float) and abs(one) != float("inf") else one for one in args
        )

    def _judge(
        self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], numbers: list[float]
    ) -> None:
        half_in = any(is_low_precision(one.dtype) for one in inputs)
        half_out = any(is_low_precision(one.dtype) for one in outputs)
        if name in ("_softmax", "_safe_softmax"):
            self._softmax(name, args, inputs[0], outputs[0])
        elif name.startswith("_scaled_dot_product"):
            for mask in inputs[3:4]:
                self._mask_rows(name, mask, -1, safe=True)
        elif name == "sigmoid" and half_out:
            self._half_probabilities[id(outputs[0])] = outputs[0]
        elif name in _LOGS or (name == "binary_cross_entropy" and id(inputs[0]) in self._half_probabilities):
            self._log(name, inputs, half_in)
        elif name in _SAME_VALUES and inputs and id(inputs[0]) in self._half_probabilities:
            self._half_probabilities[id(outputs[0])] = outputs[0]
        if name == "_to_copy" and half_out:
            self._cast(args[0], outputs[0])
        elif half_in or half_out:
            self._finite(name, inputs, outputs, numbers)
        if half_in:
            self._half_arithmetic(name, args, kwargs, inputs[0], outputs[0])
        if name == "arange" and half_out and not _counts(outputs[0]):
            self._positions(name, outputs[0].dtype)

    def _half_arithmetic(self, name: str, args: Any, kwargs: Any, first: Tensor, output: Tensor) -> None:
        label = _label(first.dtype)
        if name == "_log_softmax":
            self._report("softmax", "warning", name, f"log-softmax in {label} rounds log-probabilities")
        elif (name in _NORMS or _is_root(name, args)) and is_low_precision(output.dtype):
            self._report("norm", "warning", name, f"the statistics of a norm are computed in {label}")
        elif name in _SCANS and is_low_precision(output.dtype):
            self._report("reduction", "warning", name, f"{name} accumulates in {label}")
        elif name in ("sum", "mean") and is_low_precision(output.dtype):
            self._sum(name, args, kwargs, first, output)
        elif name in _LOSSES:
            self._report("loss", "error", name, f"a loss is computed from {label}")
        elif name in ("sin", "cos"):
            turn = float(first.detach().abs().max()) * torch.finfo(first.dtype).eps if first.numel() else 0.0
            severity: Severity = "error" if turn > 0.05 else "warning"
            message = f"angles in {label} are off by up to {turn:.2g} radians"
            self._report("angle", severity, name, message)
        elif name in _GROWING and output.dtype == first.dtype and output.numel():
            limit = torch.finfo(output.dtype).max
            # What a mask has filled in is not an activation.
            size = output.detach().abs()
            largest = float(size.masked_fill(output.detach() <= -limit * 0.99, 0.0).max())
            if 0.5 * limit < largest < float("inf"):
                message = f"activations reach {largest / limit:.0%} of the largest number of {label}"
                self._report("activation", "warning", name, message)

    def _sum(self, name: str, args: Any, kwargs: Any, first: Tensor, output: Tensor) -> None:
        """The kernel may accumulate in float32 and round once, or not: the result tells."""
        exact = getattr(torch.ops.aten, name)(first.detach().float(), *args[1:], **{**kwargs, "dtype": torch.float32})
        # In units of what was summed, so that terms that cancel do not count as an error.
        size = getattr(torch.ops.aten, name)(
            first.detach().float().abs(), *args[1:], **{**kwargs, "dtype": torch.float32}
        )
        error = float(((output.detach().float() - exact).abs() / size.clamp(min=1e-30)).max()) if exact.numel() else 0.0
        label = _label(first.dtype)
        if error > 2 * torch.finfo(first.dtype).eps:
            self._report("reduction", "warning", name, f"{name} in {label} is off by {error:.1%} of its terms")
        elif first.numel() > output.numel():
            self._report("reduction", "info", name, f"the result of {name} is rounded to {label}")

    def _softmax(self, name: str, args: Any, scores: Tensor, output: Tensor) -> None:
        dim = args[1] if isinstance(args[1], int) else -1
        self._mask_rows(name, scores, dim, safe=name == "_safe_softmax")
        if is_low_precision(output.dtype):
            label = _label(output.dtype)
            self._report("softmax", "warning", name, f"softmax in {label} rounds probabilities, small ones to 0")
            self._half_probabilities[id(output)] = output

    def _mask_rows(self, name: str, scores: Tensor, dim: int, *, safe: bool) -> None:
        """Rows of which nothing is visible; `safe` operations give 0 where all is minus infinity."""
        if scores.numel() == 0 or scores.ndim == 0:
            return
        largest = scores.detach().amax(dim)
        if not safe and bool((largest == float("-inf")).any()):
            self._report("masked_row", "error", name, "a row is masked as a whole: its softmax is NaN")
        elif bool(((largest <= 0.5 * torch.finfo(scores.dtype).min) & (largest != float("-inf"))).any()):
            message = "a row is masked as a whole with finite values: its softmax spreads over what was to be hidden"
            self._report("masked_row", "warning", name, message)

    def _log(self, name: str, inputs: list[Tensor], half_in: bool) -> None:
        if id(inputs[0]) in self._half_probabilities:
            message = "the logarithm of a probability that was rounded to half: take log_softmax of float32 scores"
            self._report("log", "error", name, message)
        elif half_in:
            self._report("log", "warning", name, f"{name} in {_label(inputs[0].dtype)}")

    def _cast(self, source: Tensor, output: Tensor) -> None:
        """To half from something wider."""
        if not source.is_floating_point():
            if not source.is_complex() and not bool((output.to(source.dtype) == source).all()):
                self._positions("_to_copy", output.dtype)
            return
        label = _label(output.dtype)
        if source.numel() == 1 and bool((source.detach() != 0) & (output.detach() == 0)):
            self._report("eps", "error", "_to_copy", f"the constant {float(source):g} rounds to 0 in {label}")
        lost = output.detach().isinf() & source.detach().isfinite()
        if not bool(lost.any()):
            return
        lowest = torch.finfo(source.dtype).min
        if bool((source.detach()[lost] == lowest).all()):
            message = f"a mask of {lowest:g} becomes minus infinity in {label}: a row of it alone gives NaN"
            self._report("constant", "info", "_to_copy", message)
        else:
            largest = float(source.detach()[lost].abs().max())
            self._report("nonfinite", "error", "_to_copy", f"{largest:g} becomes infinite in {label}")

    def _finite(self, name: str, inputs: list[Tensor], outputs: list[Tensor], numbers: list[float]) -> None:
        limit = min(torch.finfo(one.dtype).max for one in (*inputs, *outputs))
        if any(not abs(number) <= limit for number in numbers):
            return
        if all(bool(one.detach().isfinite().all()) for one in outputs):
            return
        if not all(bool(one.detach().isfinite().all()) for one in inputs):
            return
        output = outputs[0].detach()
        label = _label(next(one.dtype for one in (*inputs, *outputs) if is_low_precision(one.dtype)))
        hidden = torch.zeros((), dtype=torch.bool, device=output.device)
        if name in ("add", "add_", "sub", "sub_"):
            for one in inputs:
                hidden = hidden | (one.detach().abs() > 0.5 * torch.finfo(one.dtype).max)
            if bool((output.isfinite() | hidden & (output == float("-inf"))).all()):
                message = f"masks add up to minus infinity in {label}; combine them as booleans"
                self._report("constant", "warning", name, message)
                return
        what = "NaN" if bool(output.isnan().any()) else "infinity"
        self._report("nonfinite", "error", name, f"{name} in {label} makes {what} of finite numbers")

    def _positions(self, name: str, dtype: torch.dtype) -> None:
        self._report("positions", "error", name, f"integers are not exact in {_label(dtype)}")


class Literals(TorchFunctionMode):
    """Watches Python numbers that become half before any operation: `scores[hidden] = -1e9`, `torch.tensor(1e-12)`.

    Args:
        report: called with kind, severity, operation and message.
    """

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Judge the number and call the function."""
        kwargs = kwargs or {}
        if func is torch.Tensor.__setitem__:
            self._judge("setitem", args[2], args[0].dtype)
        elif func is torch.tensor and args:
            self._judge("tensor", args[0], kwargs.get("dtype"))
        return func(*args, **kwargs)

    def _judge(self, name: str, number: object, dtype: torch.dtype | None) -> None:
        if not isinstance(number, int | float) or dtype is None or not is_low_precision(dtype):
            return
        limit, label = torch.finfo(dtype).max, _label(dtype)
        if limit < abs(number) < float("inf"):
            message = f"the constant {number:g} is beyond the range of {label} ({limit:g}); use mask_value(dtype)"
            self._report("constant", "error", name, message)
        elif number != 0 and _rounded(number, dtype) == 0:
            self._report("eps", "error", name, f"the constant {number:g} rounds to 0 in {label}")


def _result_dtype(inputs: list[Tensor], kwargs: Any) -> torch.dtype | None:
    given = kwargs.get("dtype")
    if isinstance(given, torch.dtype):
        return given
    dtype: torch.dtype | None = None
    for one in inputs:
        dtype = one.dtype if dtype is None else torch.promote_types(dtype, one.dtype)
    return dtype


def _rounded(number: float, dtype: torch.dtype) -> float:
    # Without a tensor operation, which the mode would see: half of the smallest subnormal and less is 0.
    info = torch.finfo(dtype)
    return 0.0 if abs(number) <= info.smallest_normal * info.eps / 2 else number


def _is_root(name: str, args: Any) -> bool:
    """Whether the operation is x**0.5 or x**-0.5."""
    return name == "pow" and isinstance(args[1], float) and abs(args[1]) == 0.5


def _counts(values: Tensor) -> bool:
    """Whether neighbors differ by one step, as they do where integers are exact."""
    steps = values.detach().double().diff()
    return bool((steps == steps[:1]).all())


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
