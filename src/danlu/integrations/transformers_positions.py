"""transformers: stretch the rotary frequencies of a model in place, so that it reads longer text, and take it back.

Only buffers of one model instance are exchanged, and its attention where the frequencies follow the length or log-n is
wanted. No class and no module of transformers is changed.
"""

from types import TracebackType
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from danlu._common.checks import check_choice, check_integer
from danlu.integrations.transformers_dynamic_rope import AttentionPatch, DynamicRopeExtension, FrequencyRule
from danlu.positions import rope_frequencies, scale_frequencies

__all__ = ["DynamicRopeExtension", "RopeExtension", "extend_rope"]

Method = Literal["linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed", "by-parts"]

_FULL, _LOCAL = "full_attention", "sliding_attention"
# Kinds whose frequencies stay as the model was built.
_STATIC = ("default", "linear", "llama3", "yarn")
_CHANGING = {
    "dynamic": (
        "rope_type 'dynamic' stretches its frequencies itself as the text grows, and keys in the cache stay rotated by "
        "older ones (transformers issue 25104); load the model with rope_type 'default' and extend it with "
        "dynamic=True, the same factor and method='ntk-aware', which rotates keys anew"
    ),
    "longrope": "rope_type 'longrope' exchanges its frequencies itself at the length of its training",
}
# How far frequencies in this dtype are from those of the configuration, which are then taken instead.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class RopeExtension:
    """A model with stretched frequencies; `remove()`, or the end of a `with` block, restores it exactly.

    Args:
        model: the model, changed in place.
        tables: module and name of every buffer of frequencies.
        frequencies: the stretched ones (radians per position), float64.
        attention: what else was changed in the model, if anything.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tables: list[tuple[nn.Module, str]],
        frequencies: Tensor,
        attention: AttentionPatch | None = None,
    ) -> None:
        self.model = model
        self.frequencies = frequencies
        self._tables = tables
        self._attention = attention
        self._active = True
        for module, name in tables:
            original = getattr(module, name)
            # As a buffer it goes where the model goes; not persistent, so the state dict is as it was.
            module.register_buffer(_kept(name), original, persistent=False)
            setattr(module, name, frequencies.to(device=original.device, dtype=torch.float32))

    def remove(self) -> None:
        """Restore the frequencies; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        for module, name in self._tables:
            setattr(module, name, getattr(module, _kept(name)))
            delattr(module, _kept(name))
        if self._attention is not None:
            self._attention.remove()

    def __enter__(self) -> "RopeExtension":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@overload
def extend_rope(
    model: PreTrainedModel,
    *,
    factor: float | None = ...,
    method: Method = ...,
    mixed_power: float = ...,
    train_length: int | None = ...,
    logn: Literal["post"] | None = ...,
    dynamic: Literal[False] = ...,
    step: None = ...,
) -> RopeExtension: ...


@overload
def extend_rope(
    model: PreTrainedModel,
    *,
    factor: float | None = ...,
    method: Method = ...,
    mixed_power: float = ...,
    train_length: int | None = ...,
    logn: Literal["post"] | None = ...,
    dynamic: Literal[True],
    step: int | None = ...,
) -> DynamicRopeExtension: ...


def extend_rope(
    model: PreTrainedModel,
    *,
    factor: float | None = None,
    method: Method = "ntk-mixed",
    mixed_power: float = 0.625,
    train_length: int | None = None,
    logn: Literal["post"] | None = None,
    dynamic: bool = False,
    step: int | None = None,
) -> RopeExtension | DynamicRopeExtension:
    r"""Stretch the rotary frequencies of a model, by one factor or as the text grows, without training.

    Definition:
        The frequencies $\theta$ of every layer with full attention become
        [`scale_frequencies`][danlu.positions.scale_frequencies] of them by `method` and $\kappa$ = `factor`.

        With `dynamic` the attention becomes [`dynamic_rope_attention`][danlu.attention.dynamic_rope_attention]: a token
        that sees $n \le T$ tokens reads as before, and beyond $T$ the factor follows, $f n / T - (f - 1)$ with $f$ =
        `factor` and $T$ = `train_length`. Keys are then cached without rotation and rotated for the query that reads
        them, so that text from the cache is the text that is read at once.

    Args:
        model: a RoPE model of transformers, of either style of rotation ("dynamic": halves only). It is changed in
            place.
        factor: $\kappa > 0$, length of the text over the length that the model reads now, or $f \ge 1$; None means 8,
            or 1 with `dynamic`: as much as the text is too long.
        method: a rule of the function. In the articles "ntk-mixed" is the best of them without training, and ReRoPE,
            which is `patch_rope`, better still. "ntk-aware" with `dynamic` and a factor of 2 is "dynamic NTK".
        mixed_power: of "ntk-mixed", as in the function.
        train_length: $T$ (tokens) of `dynamic`, where None means `max_position_embeddings`; of "by-parts" and `logn`,
            where None means `original_max_position_embeddings` of the configuration, if it has one.
        logn: "post" multiplies the query that sees $n$ keys by $\max(1, \log n / \log T)$ as well, which keeps
            attention as peaked over more keys.
        dynamic: whether the factor follows the length.
        step: of `dynamic`, how often the frequencies change beyond $T$ (tokens); None means $\max(1, T / 8)$.

    Returns:
        A handle: `handle.remove()`, or leaving a `with` block, restores the model bit for bit.

    Raises:
        TypeError: `model` is not a transformers model, or an option has a wrong type.
        ValueError: an option is wrong, as in the function, or the model cannot be extended: it has no rotary
            frequencies, changes them itself with the length ("dynamic", "longrope"), has local layers that share them,
            has several different ones, is extended already, or is patched by `patch_rope`; with `dynamic` or `logn`
            also what `patch_rope` refuses, and packed texts when the model is called with `dynamic`. The message has
            the reason.

    Numerics:
        Computed in float64, from the configuration where the model has its default frequencies, so that a model that
        was cast to bfloat16 gets exact ones; held in float32, as transformers does, and in float64 with `dynamic`. The
        factor of the tables that "yarn" has stays.

    Cost:
        None with one factor. With `logn` as in [`rope_attention`][danlu.attention.rope_attention], with `dynamic` as in
        [`dynamic_rope_attention`][danlu.attention.dynamic_rope_attention]: a generated token then rotates all keys.

    Differences:
        "dynamic" of transformers takes new frequencies as the text grows and leaves the keys in its cache rotated by
        the old ones, and all tokens of a call have the frequencies of its end. Here tokens have those of what they see.
        Do not take a cache of before the call to after it. `save_pretrained` writes the model as it was: neither the
        frequencies nor the configuration are part of what is saved.

    Source:
        As in [`scale_frequencies`][danlu.positions.scale_frequencies].

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from danlu.integrations.transformers import extend_rope
        >>> config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2, max_position_embeddings=8)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with extend_rope(model, method="linear", factor=4) as handle:
        ...     print(handle.frequencies[0].item(), model(torch.arange(16)[None]).logits.shape)
        0.25 torch.Size([1, 16, 16])
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    check_choice("method", method, get_args(Method))
    if not isinstance(dynamic, bool):
        raise TypeError(f"dynamic must be a bool, got {type(dynamic).__name__}")
    if logn is not None:
        check_choice("logn", logn, ("post",))
    if step is not None and not dynamic:
        raise ValueError(f"step is an option of dynamic=True, got {step} without it")
    if train_length is not None:
        check_integer("train_length", train_length, low=1 if logn is None else 2)
        if not (dynamic or logn or method == "by-parts"):
            raise ValueError(f"train_length is of use with method='by-parts', dynamic or logn, got it with {method!r}")
    tables = _tables(model)
    plain, parameters = _frequencies(model, tables)
    config: Any = tables[0][0].config
    longest = int(config.max_position_embeddings)
    if factor is None:
        factor = 1.0 if dynamic else 8.0
    if dynamic:
        rule = FrequencyRule(plain, train_length or longest, factor, method, mixed_power, step)
        return DynamicRopeExtension(model, rule, logn)
    trained = train_length or int(parameters.get("original_max_position_embeddings") or longest)
    stretched = scale_frequencies(
        plain,
        method=method,
        factor=factor,
        mixed_power=mixed_power,
        train_length=trained if method == "by-parts" else None,
    )
    attention = None if logn is None else AttentionPatch(model, None, logn, max(2, trained))
    return RopeExtension(model, tables, stretched, attention)


def _kept(name: str) -> str:
    return f"danlu_original_{name}"


def _tables(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Module and name of the frequencies of all layers with full attention; raise if they cannot be stretched."""
    name = type(model).__name__

    def refuse(reason: str) -> None:
        raise ValueError(f"{name} cannot be extended: {reason}")

    if any(hasattr(module, "danlu_rerope") for module in model.modules()):
        refuse("it is patched by patch_rope, or extended by attention of its own; extend first, then patch")
    found: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        # Models with frequencies by kind of layer: the local ones are within the trained positions.
        table = f"{_FULL}_inv_freq" if isinstance(kind, dict) else "inv_freq"
        kind = kind.get(_FULL) if isinstance(kind, dict) else kind
        if kind is None or not isinstance(getattr(module, table, None), Tensor):
            continue
        if hasattr(module, _kept(table)):
            refuse("it is extended already; remove the first extension")
        if kind not in _STATIC:
            refuse(_CHANGING.get(kind, f"what its rope_type {kind!r} does with frequencies is not known here"))
        if table == "inv_freq" and _has_local_layers(module):
            refuse(
                "it has layers with a sliding window, which is within the trained positions, and they share the "
                "frequencies"
            )
        found.append((module, table))
    if not found:
        refuse("it has no rotary frequencies that its layers read")
    return found


def _has_local_layers(rotary: nn.Module) -> bool:
    config: Any = rotary.config
    layers = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None if layers is None else _LOCAL in layers


def _frequencies(model: PreTrainedModel, tables: list[tuple[nn.Module, str]]) -> tuple[Tensor, dict[str, Any]]:
    """The frequencies that all tables share, float64 on the CPU, and their parameters in the configuration."""
    module, table = tables[0]
    held = getattr(module, table).detach()
    if any(not torch.equal(held, getattr(other, name).to(held.device)) for other, name in tables[1:]):
        raise ValueError(
            f"{type(model).__name__} cannot be extended: its parts have different rotary frequencies; extend them one "
            "by one"
        )
    config: Any = module.config
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(_FULL) or parameters
    plain = held.to(device="cpu", dtype=torch.float64)
    exact = rope_frequencies(2 * len(held), base=float(parameters.get("rope_theta", 10000.0)))
    if torch.allclose(plain, exact, rtol=_ROUNDING[held.dtype], atol=0.0):
        return exact, parameters
    if held.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{type(model).__name__} cannot be extended: its frequencies were cast to {held.dtype}; load the model in "
            "that dtype instead, which leaves them in float32"
        )
    return plain, parameters
