"""The byte language model read with stretched frequencies, each length with the factor that it needs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from danlu.attention import dynamic_rope_attention, window_mask
from danlu.lab.data import python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.byte_lm import ByteLM, ByteTransformer, _Attention
from danlu.lab.tasks.training import generator, training_device
from danlu.lab.trial import Fit, Options
from danlu.positions import apply_rope, logn_scale, scale_frequencies

__all__ = ["StretchedLM"]

Rule = Literal["default", "linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed", "by-parts"]


@dataclass(frozen=True)
class StretchedLM(ByteLM):
    """The byte language model, trained with plain RoPE and read in longer windows.

    Metrics: `bits_per_byte@rx`, the loss on the *same* last context / 2 bytes of every window given r = 1, 2, 4, ...
    `reach` times the training length of text before their end. The frequencies are stretched by `rule` with the factor
    r, so that all arms read alike at the training length. With `dynamic` they follow the length instead: a byte that
    sees n others reads with the factor n over the training length.

    `logn` scales the queries by the log-n factor for models that were trained without it. `local` lets a byte see the
    last `context` bytes only.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "stretched byte_lm"

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"rule": "default", "dynamic": False, "logn": False, "local": False, "reach": 8, "windows": 128}

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        model = fit.model
        if not isinstance(model, ByteTransformer):
            raise TypeError(f"StretchedLM evaluates a ByteTransformer, not {type(model).__name__}")
        rule = str(options["rule"])
        if rule not in get_args(Rule):
            raise TrialError(f"unknown rule {rule!r}; known: {', '.join(get_args(Rule))}")
        model.eval()
        context, reach = int(options["context"]), int(options["reach"])
        corpus = python_source()
        documents = corpus.validation if split == "validation" else corpus.test
        text = torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8)
        longest = context * reach
        # Places are the same for every seed and arm: differences are then differences of models.
        starts = torch.randint(len(text) - longest, (int(options["windows"]), 1), generator=generator("test", longest))
        windows = text[starts + torch.arange(longest + 1)].long().to(training_device(options))
        metrics: dict[str, float] = {}
        multiple = 1
        while multiple <= reach:
            mode = _Stretched(
                context=context,
                rule=cast("Rule", rule),
                factor=None if options["dynamic"] else multiple,
                logn=bool(options["logn"]),
                local=bool(options["local"]),
            )
            metrics[f"bits_per_byte@{multiple}x"] = _bits(model, windows[:, -context * multiple - 1 :], mode)
            multiple *= 2
        return metrics


def _bits(model: ByteTransformer, windows: Tensor, mode: "_Stretched") -> float:
    """Mean loss in bits on the last half context of every window."""
    last, total = mode.context // 2, 0.0
    # Eight windows at a time keep the score matrices of long contexts small.
    for chunk in windows.split(8):
        logits = model(chunk[:, :-1], mode)[:, -last:]
        total += float(F.cross_entropy(logits.flatten(0, 1), chunk[:, -last:].flatten(), reduction="sum"))
    return total / (len(windows) * last) / math.log(2)


@dataclass(frozen=True)
class _Stretched(_Attention):
    """Causal RoPE attention with stretched frequencies; a factor of None follows the length."""

    rule: Rule = "default"
    factor: int | None = 1
    logn: bool = False
    local: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor) -> Tensor:
        """Attend; all shapes are (batch, heads, length, head_dim), queries and keys not yet rotated."""
        length = query.shape[-2]
        positions = torch.arange(length, device=query.device)
        if self.logn:
            query = query * logn_scale(positions + 1, self.context, "post")[:, None].to(query.dtype)
        if self.factor is None and self.rule != "default":
            return dynamic_rope_attention(
                query, key, value, train_length=self.context, method=self.rule, inv_freq=inv_freq
            )
        if self.factor not in (None, 1) and self.rule != "default":
            inv_freq = scale_frequencies(
                inv_freq,
                method=self.rule,
                factor=self.factor,
                train_length=self.context if self.rule == "by-parts" else None,
            )
        query, key = (apply_rope(x, positions, inv_freq) for x in (query, key))
        if self.local:
            mask = window_mask(length, window=self.context, device=query.device)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
