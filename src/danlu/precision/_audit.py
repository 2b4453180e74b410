"""Hazards of half precision in a model, found before the training run that they would spoil.

Source: "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28), the list of what to do when the loss becomes NaN.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from danlu._common.checks import is_low_precision
from danlu.precision._hazards import Hazards, Kind, Literals, Severity
from danlu.precision._probe import unchanged

__all__ = ["Finding", "audit_precision"]

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
_EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "layer_norm_epsilon")
# Their kernels hold statistics and eps in float32 whatever the dtype of the input.
_SAFE_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Finding:
    r"""One hazard.

    Definition:
        "error": gives NaN, infinity or a wrong number, in this run or for inputs that must be expected. "warning":
        loses accuracy or is close to the limits. "info": worth knowing, harmless here.

    Args:
        module: path of the innermost module in which it happened; "(model)" for the model itself, "(loss)" for what
            the loss function does outside of it.
        kind: "activation", "angle", "buffer", "constant", "eps", "log", "loss", "masked_row", "nonfinite", "norm",
            "parameter", "positions", "reduction" or "softmax".
        severity: "error", "warning" or "info".
        operation: the ATen operation, or the name of a tensor or attribute for what is found without running.
        message: what is wrong, with the numbers.

    Numerics:
        None.

    Source:
        As in [`audit_precision`][danlu.precision.audit_precision].

    Example:
        >>> from danlu.precision import Finding
        >>> print(Finding("encoder.norm", "eps", "error", "add", "the constant 1e-12 rounds to 0 in float16"))
        error    eps          encoder.norm: the constant 1e-12 rounds to 0 in float16 (add)
    """

    module: str
    kind: Kind
    severity: Severity
    operation: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity:<8} {self.kind:<12} {self.module}: {self.message} ({self.operation})"


def audit_precision(
    model: nn.Module,
    example_batch: Any,
    dtype: torch.dtype = torch.float16,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    autocast: bool = True,
) -> list[Finding]:
    r"""List the hazards of a model in half precision, with the path of the module of each.

    Definition:
        A look at parameters, buffers and eps attributes, then one forward pass under autocast in which every operation
        is judged by its dtypes and its numbers:

        | kind | what is found |
        |---|---|
        | constant | a mask or other constant beyond the range of the dtype; masks that add up to $-\infty$ |
        | eps | an $\varepsilon$ that rounds to 0, or a $1 - \varepsilon$ that rounds to 1 |
        | nonfinite | Inf or NaN made of finite numbers |
        | masked_row | a softmax over nothing but masked scores |
        | softmax, log, norm, reduction, loss | computed in half: rounded where float32 is needed |
        | angle, positions | sines of half angles; integers that the dtype cannot count |
        | activation | numbers beyond half of the largest one |
        | parameter, buffer | stored in half |

    Args:
        model: the model, in the mode (train or eval) that it is to run in.
        example_batch: realistic numbers and masks, padding included: what does not happen is not seen. A mapping is
            given to the model as keywords, a tuple or list as arguments, anything else as the one argument.
        dtype: torch.float16 or torch.bfloat16.
        loss_fn: `(model, batch) -> loss`, as in [`TrainStep`][danlu.precision.TrainStep]; the loss is then audited,
            too, and the batch may be anything.
        autocast: run under autocast; False runs the model as it is, such as after `model.half()`.

    Returns:
        Findings, the most severe first, each once per module, kind and operation; empty for a clean model.

    Raises:
        TypeError: `model` is not a module, or `dtype` is not a half dtype.
        Exception: whatever the model itself raises.

    Numerics:
        What autocast leaves in half depends on the device: on CUDA it runs softmax, log and norms in float32, on a CPU
        it does not. The findings are those of the device of the model. Buffers and random states are restored.

    Cost:
        One forward pass, slowed down by the questions about its numbers.

    Source:
        "在bert4keras中使用混合精度和XLA加速训练" (2022-04-28); the lists of operations in PyTorch's documentation of
        automatic mixed precision.

    Example:
        >>> import torch
        >>> from danlu.precision import audit_precision
        >>> class Masked(torch.nn.Module):
        ...     def forward(self, scores, mask):
        ...         return (scores.half() - (1 - mask.half()) * 1e12).float().softmax(-1)
        >>> for finding in audit_precision(Masked(), (torch.zeros(2, 3), torch.tensor([1, 1, 0]))):
        ...     print(finding.severity, finding.kind, finding.operation)
        error constant mul
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(dtype, torch.dtype) or not is_low_precision(dtype):
        raise TypeError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype!r}")
    findings: dict[tuple[str, str, str], Finding] = {}
    for finding in _static(model, dtype):
        findings.setdefault((finding.module, finding.kind, finding.operation), finding)

    place = _Place()

    def report(kind: Kind, severity: Severity, operation: str, message: str) -> None:
        finding = Finding(place.now, kind, severity, operation, message)
        key = (finding.module, kind, operation)
        known = findings.get(key)
        if known is None or _SEVERITIES.index(severity) < _SEVERITIES.index(known.severity):
            findings[key] = finding

    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    context = torch.autocast(device.type, dtype=dtype, enabled=autocast)
    # With gradients, since modules take other paths for inference.
    with unchanged(model), torch.enable_grad(), context, place.follow(model):
        try:
            with Hazards(report), Literals(report):
                output = _call(model, example_batch) if loss_fn is None else loss_fn(model, example_batch)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            # torch refuses a constant before any mode can see it, and the run ends here.
            place.stack[:] = [place.entered]
            report("constant", "error", "scalar", f"a constant is beyond the range: {error}")
            output = None
    place.stack.clear()
    for tensor in _losses(output):
        if is_low_precision(tensor.dtype):
            report("loss", "error", "loss", f"the loss is {str(tensor.dtype).removeprefix('torch.')}")
    return sorted(findings.values(), key=lambda one: _SEVERITIES.index(one.severity))


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*cast("Sequence[Any]", batch))
    return model(batch)


def _losses(output: Any) -> list[Tensor]:
    """The scalar among the outputs: a loss function's, or that of a model which computes its own."""
    candidates = [output, getattr(output, "loss", None)]
    return [one for one in candidates if isinstance(one, Tensor) and one.ndim == 0 and one.is_floating_point()]


def _static(model: nn.Module, dtype: torch.dtype) -> Iterator[Finding]:
    info = torch.finfo(dtype)
    for path, module in model.named_modules():
        place = path or "(model)"
        for name, param in module.named_parameters(recurse=False):
            if is_low_precision(param.dtype) and param.requires_grad:
                message = f"a parameter in {str(param.dtype).removeprefix('torch.')} loses small updates"
                yield Finding(place, "parameter", "warning", name, message)
        for name, buffer in module.named_buffers(recurse=False):
            if is_low_precision(buffer.dtype):
                message = f"a buffer was cast to {str(buffer.dtype).removeprefix('torch.')}"
                yield Finding(place, "buffer", "warning", name, message)
        if isinstance(module, _SAFE_NORMS):
            continue
        for name in _EPS_NAMES:
            value = getattr(module, name, None)
            if isinstance(value, float) and 0 < value <= info.smallest_normal * info.eps / 2:
                label = str(dtype).removeprefix("torch.")
                yield Finding(
                    place, "eps", "info", name, f"{name}={value:g} rounds to 0 in {label} if it is used in it"
                )


class _Place:
    """Which module is running."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.entered = "(model)"

    @property
    def now(self) -> str:
        """Path of the innermost module that runs."""
        return self.stack[-1] if self.stack else "(loss)"

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the modules of `model` within the context."""
        handles: list[Any] = []

        def watch(module: nn.Module, path: str) -> None:
            def enter(*_: Any) -> None:
                self.stack.append(path)
                self.entered = path

            def leave(*_: Any) -> None:
                self.stack.pop()
                self.entered = self.now

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))

        for path, module in model.named_modules():
            watch(module, path or "(model)")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
