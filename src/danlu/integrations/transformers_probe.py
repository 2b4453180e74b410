"""transformers, and `nn.MultiheadAttention`: how far the attention of a model concentrates, while it runs.

The functions in transformers' `ALL_ATTENTION_FUNCTIONS` are wrapped while a probe is open, for all models of the
process; the wrapper only looks at the modules of probed ones. No class is changed, and every model calls the function
that it called before.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from danlu._common.checks import check_choice, check_integer, check_real
from danlu.integrations._attention_chart import attention_chart
from danlu.integrations._attention_rows import STATISTICS, RowSample, Rules, measure_rows
from danlu.integrations._attention_rules import (
    padding_of,
    projected,
    rules_of_split,
    rules_of_torch,
    rules_of_transformers,
)
from danlu.integrations.transformers_prefix import SPLIT_NAMES, split_kind

__all__ = ["AttentionProbe", "Statistic"]

Statistic = Literal["s", "n_eff", "n_eff_rest", "entropy", "sink", "logit_mean", "logit_sd", "gaussian_s"]
Function = Callable[..., Any]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# The probes that are open, and what the table of transformers held in its own right before the first.
_open: "list[AttentionProbe]" = []
_replaced: dict[str, Function | None] = {}


class AttentionProbe:
    r"""Look at the attention of a model while it runs: how many keys do its heads read?

    Definition:
        For every row (query) of every head, with weights $p$ = softmax of the scores $x$ over its $n$ visible keys:

        | statistic | |
        |---|---|
        | "n_eff" | $1/\sum_j p_j^2$, the number of keys that are read |
        | "s" | $S = \sqrt{n_{\mathrm{eff}}/n}$, see [`attention_sparsity`][danlu.diagnostics.attention_sparsity] |
        | "n_eff_rest" | the same without the first visible key, weights rescaled |
        | "entropy" | $-\sum_j p_j \log p_j$ (nats) |
        | "sink" | $p$ of the first visible key |
        | "logit_mean", "logit_sd" | mean and standard deviation of $x$ |
        | "gaussian_s" | $e^{-\mathrm{sd}^2/2}$, what $S$ would be of infinitely many Gaussian scores |

    Args:
        model: a model of transformers with any attention implementation, or any module with
            `torch.nn.MultiheadAttention` in it. It is looked at while the `with` block is open, and computes what it
            did, bit for bit.
        select: function of a module's name that says whether to look at it; None means all.
        min_keys: $\ge 2$; rows that see fewer are counted as skipped.
        sample: rows to keep per layer, $\ge 1$. All statistics are exact until there are more; then they are of a
            uniform sample of all rows.
        share: share of the rows of a call to look at, in (0, 1], drawn at random; what is spent is in proportion.
        tile: rows at a time; None takes as many as make 4 MiB of scores on the CPU and 16 MiB elsewhere.

    Raises:
        TypeError: `model` is no module, or an option is of a wrong type.
        ValueError: an option is out of its range, or there is nothing that can be looked at: no attention that goes
            through transformers' interface and no `MultiheadAttention`, attention with learned key biases or zero
            keys, or attention of danlu that is no softmax of products of these queries and keys.

    Numerics:
        Scores in float32, float64 for float64 models. A row without two visible keys has no concentration and is
        skipped. So are queries that are padding, in self-attention without a cache: their own slot is hidden from
        them. What a sink outside of the keys (`s_aux`) takes is left out.

    Cost:
        One more product of queries and keys per layer, with some ten passes over each tile; memory of two tiles and,
        per layer, `sample` x heads x 8 numbers. On one CPU thread it takes as long as three to four such products; with
        `share=0.25`, about as long as one.

    Differences:
        It needs no eager attention: the weights are computed again from queries and keys, in tiles of rows. Under
        `torch.compile` it breaks the graph.

    Source:
        "注意力机制真的可以“集中注意力”吗?" (2023-12-12).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from danlu.integrations.transformers_probe import AttentionProbe
        >>> config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with AttentionProbe(model) as probe:
        ...     _ = model(torch.arange(16)[None])
        >>> record = probe.records()[0]
        >>> record["layer"], record["head"], record["rows"], record["skipped"]
        ('model.layers.0.self_attn', 0, 15, 1)
        >>> probe.rows("model.layers.0.self_attn")["n_eff"].shape
        torch.Size([2, 15])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        select: Callable[[str], bool] | None = None,
        min_keys: int = 2,
        sample: int = 4096,
        share: float = 1.0,
        tile: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if select is not None and not callable(select):
            raise TypeError(f"select must be a function of a name, got {type(select).__name__}")
        self.min_keys = check_integer("min_keys", min_keys, low=2)
        self.sample = check_integer("sample", sample, low=1)
        self.share = check_real("share", share, low=0.0, high=1.0, low_open=True)
        self.tile = None if tile is None else check_integer("tile", tile, low=1)
        self._model = model
        self._names = {m: name for name, m in model.named_modules() if select is None or select(name)}
        self._found: dict[str, RowSample] = {}
        self._calls: dict[nn.MultiheadAttention, int] = {}
        # Of its own, so that looking changes no random number of the model.
        self._generator = torch.Generator().manual_seed(0)
        _refuse_what_cannot_work(model, list(self._names))

    # ---- looking ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> "AttentionProbe":
        shadowed = [m for m in self._names if isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer)]
        if self in _open or any(isinstance(vars(m).get("forward"), _Shadow) for m in shadowed):
            raise RuntimeError("this model is under a probe already; close that first")
        if not _open:
            _wrap_functions()
        _open.append(self)
        for module in shadowed:
            # Not hooks: with hooks torch takes other kernels, whose results differ in their last bits.
            observe = self._observe_layer if isinstance(module, nn.TransformerEncoderLayer) else self._observe_torch
            vars(module)["forward"] = _Shadow(module, observe, vars(module).get("forward"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._names:
            shadow = vars(module).get("forward")
            if isinstance(shadow, _Shadow):
                del vars(module)["forward"]
                if shadow.previous is not None:
                    vars(module)["forward"] = shadow.previous
        _open.remove(self)
        if not _open:
            _unwrap_functions()

    @torch.compiler.disable
    @torch.no_grad()
    def _observe_transformers(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: object, options: Mapping[str, Any]
    ) -> None:
        name = self._names.get(module)
        if name is None or query.shape[2] == 0:
            return
        causal = options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        own = query.shape[2] == key.shape[2] and not getattr(module, "is_cross_attention", False)
        split = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if split in SPLIT_NAMES:
            kind, prefix = split_kind(split, module, query.shape[2], key.shape[2], options)
            rules, causal = rules_of_split(query, key, kind, prefix, cast("Tensor | None", mask), own=own)
        else:
            rules, causal = rules_of_transformers(query, key, mask, options, causal=causal, own=own)
        scale = options.get("scaling")
        softcap = options.get("softcap")
        self._add(name, query, key, rules, causal, query.shape[-1] ** -0.5 if scale is None else float(scale), softcap)

    @torch.compiler.disable
    @torch.no_grad()
    def _observe_torch(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        attention = cast("nn.MultiheadAttention", module)
        self._calls[attention] = self._calls.get(attention, 0) + 1
        query, key = arguments["query"].detach(), arguments["key"].detach()
        padding, mask = arguments["key_padding_mask"], arguments["attn_mask"]
        if query.is_nested:
            query = key = query.to_padded_tensor(0.0)
            padding = padding_of(arguments["query"])
        if query.ndim == 2:
            query, key = query[None], key[None]
            padding = None if padding is None else padding[None]
        elif not attention.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        heads = attention.num_heads
        query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in projected(attention, query, key))
        if isinstance(mask, Tensor):
            # Heads of a sample stand together in the three-dimensional form.
            mask = mask.view(-1, heads, *mask.shape[1:]) if mask.ndim == 3 else mask[None, None]
        padding = None if padding is None else padding[:, None, None, :]
        rules = rules_of_torch(query, key, [mask, padding], own=arguments["query"] is arguments["key"])
        self._add(self._names[module], query, key, rules, False, query.shape[-1] ** -0.5, None)

    def _observe_layer(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        """An encoder layer of torch: in its fused form it does not call its attention."""
        layer = cast("nn.TransformerEncoderLayer", module)
        attention = layer.self_attn
        called = self._calls.pop(attention, 0)
        if called or attention not in self._names:
            return
        x = arguments["src"]
        x = layer.norm1(x) if layer.norm_first else x
        masks = {"key_padding_mask": arguments["src_key_padding_mask"], "attn_mask": arguments["src_mask"]}
        self._observe_torch(attention, {"query": x, "key": x, **masks})
        self._calls.pop(attention, 0)

    def _add(
        self, name: str, query: Tensor, key: Tensor, rules: Rules, causal: bool, scale: float, softcap: float | None
    ) -> None:
        chosen = None if self.share == 1 else self._drawn(query.shape[2])
        if chosen is not None and len(chosen) == 0:
            return
        with torch.autocast(device_type=query.device.type, enabled=False):
            found = measure_rows(
                query.detach(),
                key.detach(),
                scale=scale,
                rules=rules,
                is_causal=causal,
                min_keys=self.min_keys,
                softcap=softcap,
                tile=self.tile,
                chosen=chosen,
            )
        self._found.setdefault(name, RowSample(self.sample, query.shape[1])).add(found)

    def _drawn(self, rows: int) -> Tensor:
        """Rows to look at; their number is right on average, also for calls of one row."""
        count = int(self.share * rows + torch.rand((), generator=self._generator, dtype=torch.float64).item())
        return torch.randperm(rows, generator=self._generator)[:count].sort().values

    # ---- what was found ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the attention modules that have run, in the order of their first run."""
        return tuple(self._found)

    def rows(self, layer: str) -> dict[Statistic, Tensor]:
        """The rows of a layer that were kept: statistic -> float32 `(heads, rows)`; NaN where a head skipped a row.

        The rows of all statistics are the same, so that they can be set against each other.

        Args:
            layer: one of `layers`.

        Raises:
            ValueError: it has not run under the probe.
        """
        check_choice("layer", layer, self.layers)
        values = self._found[layer].values
        return {cast("Statistic", name): values[:, i].T for i, name in enumerate(STATISTICS)}

    def records(self, *, quantiles: Sequence[float] = _QUANTILES) -> list[dict[str, str | int | float]]:
        """One record per layer and head, ready for a data frame.

        Args:
            quantiles: of every statistic over the rows, in [0, 1].

        Returns:
            Dictionaries with `layer`, `head`, `rows` and `skipped` (exact counts), and `n_eff@0.5` and so on.

        Raises:
            TypeError: a quantile is no number.
            ValueError: a quantile is outside [0, 1].
        """
        points = torch.tensor([check_real("quantiles", q, low=0.0, high=1.0) for q in quantiles])
        out: list[dict[str, str | int | float]] = []
        for layer, found in self._found.items():
            values = found.values.nanquantile(points, dim=0) if len(found.values) else None
            for head in range(len(found.rows)):
                record: dict[str, str | int | float] = {
                    "layer": layer,
                    "head": head,
                    "rows": int(found.rows[head]),
                    "skipped": int(found.skipped[head]),
                }
                for i, name in enumerate(STATISTICS):
                    for j, q in enumerate(quantiles):
                        record[f"{name}@{q:g}"] = float("nan") if values is None else float(values[j, i, head])
                out.append(record)
        return out

    def table(self, *, quantile: float = 0.5) -> str:
        """The statistics of every layer and head as text.

        Args:
            quantile: which one over the rows; 0.5 is the median.

        Raises:
            TypeError: `quantile` is no number.
            ValueError: it is outside [0, 1].
        """
        records = self.records(quantiles=(quantile,))
        width = max([len("layer"), *(len(name) for name in self.layers)])
        lines = [" ".join([f"{'layer':<{width}}", "head", "   rows", *(f"{name:>10}" for name in STATISTICS)])]
        for record in records:
            numbers = (f"{record[f'{name}@{quantile:g}']:>10.4g}" for name in STATISTICS)
            lines.append(
                " ".join([f"{record['layer']:<{width}}", f"{record['head']:>4}", f"{record['rows']:>7}", *numbers])
            )
        return "\n".join(lines)

    def plot(self, statistic: Statistic = "n_eff") -> str:
        """An SVG of two pictures: by layer, what 90 % of the rows are between, with the median of every head; and the
        same medians by layer and head.

        Args:
            statistic: what to draw.

        Raises:
            ValueError: `statistic` is unknown, or nothing has run under the probe.
            ImportError: `vl_convert` is missing, which `pip install 'danlu[lab]'` brings.
        """
        check_choice("statistic", statistic, STATISTICS)
        if not self._found:
            raise ValueError("no attention has run under the probe")
        try:
            converter = import_module("vl_convert")
        except ModuleNotFoundError as error:
            raise ImportError("plot needs vl_convert; install it with: pip install 'danlu[lab]'") from error
        return str(converter.vegalite_to_svg(attention_chart(statistic, self._found)))


# ---- how the modules are watched ------------------------------------------------------------------------------------


class _Shadow:
    """A module's `forward` under the probe: what it was, then a look at its arguments."""

    def __init__(
        self, module: nn.Module, observe: Callable[[nn.Module, Mapping[str, Any]], None], previous: Function | None
    ) -> None:
        self._module = module
        self._observe = observe
        self.previous = previous
        self._forward: Function = previous or module.forward
        self._signature = inspect.signature(self._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self._observe(self._module, bound.arguments)
        return out


def _wrap_functions() -> None:
    for name in {*ALL_ATTENTION_FUNCTIONS, "eager"}:
        if name.startswith("paged|"):
            continue
        original: Function | None = ALL_ATTENTION_FUNCTIONS.get(name)
        _replaced[name] = None
        # What `register` put there lies below, and comes back when the entry above it is deleted.
        with suppress(KeyError):
            del ALL_ATTENTION_FUNCTIONS[name]
            _replaced[name] = original
        ALL_ATTENTION_FUNCTIONS[name] = partial(_call_and_look, original)


def _unwrap_functions() -> None:
    for name, previous in _replaced.items():
        del ALL_ATTENTION_FUNCTIONS[name]
        if previous is not None:
            ALL_ATTENTION_FUNCTIONS[name] = previous
    _replaced.clear()


def _call_and_look(
    original: Function | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    out = (original or _eager_of(module))(module, query, key, value, attention_mask, *args, **kwargs)
    for probe in _open:
        probe._observe_transformers(module, query, key, attention_mask, kwargs)
    return out


def _eager_of(module: nn.Module) -> Function:
    """The eager attention that this module would have called: every modeling file has its own."""
    for scope in (inspect.unwrap(type(module).forward).__globals__, vars(sys.modules[type(module).__module__])):
        if callable(scope.get("eager_attention_forward")):
            return cast("Function", scope["eager_attention_forward"])
    raise RuntimeError(f"{type(module).__name__} has no eager_attention_forward to look at; use another implementation")


def _refuse_what_cannot_work(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    parents = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    stock = [m for m in modules if isinstance(m, nn.MultiheadAttention)]
    if not stock and not any(getattr(m, "_supports_attention_backend", False) for m in parents):
        raise ValueError(
            f"{type(model).__name__} has no attention to look at: no MultiheadAttention, and no model of transformers "
            "whose attention goes through its AttentionInterface"
        )
    for parent in parents:
        implementation = str(getattr(parent.config, "_attn_implementation", None))
        if implementation.startswith("danlu_") and implementation not in ("danlu_softmax", *SPLIT_NAMES):
            raise ValueError(f"attention {implementation!r} is not a softmax of products of its queries and keys")
    if any(m.bias_k is not None or m.add_zero_attn for m in stock):
        raise ValueError("MultiheadAttention with add_bias_kv or add_zero_attn has keys that are no tokens")
