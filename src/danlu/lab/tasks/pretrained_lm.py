"""A pretrained RoPE model reading beyond its trained length, with every cure that needs no training."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu.lab.data import python_source
from danlu.lab.errors import TrialError
from danlu.lab.models import load_smollm2
from danlu.lab.tasks.training import training_device
from danlu.lab.trial import Fit, Options
from danlu.positions import rope_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PretrainedFit", "PretrainedLM", "window_attention"]

_FREQUENCIES = {"pi": "linear", "ntk_aware": "ntk-aware", "ntk_mixed": "ntk-mixed"}
_READINGS = ("rope", *_FREQUENCIES, "window", "rerope", "truncated")
_WINDOW = "danlu_trial_window"
# Rows of a tile of window attention, whose mask is held.
_TILE = 512


@dataclass(frozen=True)
class PretrainedLM:
    """The loss of a pretrained model on long documents, read by `reading`; nothing is trained, a seed is a document.

    A document of `reach` times the trained length $T$ is read in one pass. Document 0 is the language reference, the
    texts of `pydoc_data.topics` in the order of their names; the others are the long source files of the standard
    library in the order of their hashes.

    `reading`: "rope"; "pi", "ntk_aware" and "ntk_mixed", frequencies stretched by `reach`; "window", of the last $T$
    tokens only; "rerope", relative positions clipped at `window` times $T$, with the log-n factor if `logn`;
    "truncated", plain RoPE that is given the last $T$ tokens and nothing before them.

    Metrics, in nats per token: `loss@within`, on the `last` tokens before $T$; `loss@beyond`, on the `last` tokens of
    the document. All readings have the same targets.

    `model` is "smollm2", or "random": a tiny model without training that reads bytes, to try the machinery.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "pretrained_lm"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {"model": "smollm2", "dtype": "bfloat16", "device": "cpu"}

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"reading": "rope", "window": 0.5, "logn": False, "reach": 1.5, "last": 1024}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        source = python_source()
        return {
            "name": f"language reference and long source files of {source.name}",
            "sha256": hashlib.sha256((source.sha256 + _reference()).encode()).hexdigest(),
            "license": source.license,
            "split": "none: nothing is trained or chosen, and a seed is a document",
        }

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """The model as it is."""
        return PretrainedFit(options)

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on the document of the seed."""
        if not isinstance(fit, PretrainedFit):
            raise TypeError(f"PretrainedLM evaluates a PretrainedFit, not {type(fit).__name__}")
        reading = str(options["reading"])
        if reading not in _READINGS:
            raise TrialError(f"unknown reading {reading!r}; known: {', '.join(_READINGS)}")
        trained, last = int(fit.pretrained.config.max_position_embeddings), int(options["last"])
        longest = round(float(options["reach"]) * trained)
        tokens = fit.document(seed, longest + 1)
        if reading == "truncated":
            # Within the trained length it is plain RoPE, whose arm has the number.
            return {"loss@beyond": fit.loss(tokens[longest - trained :], [(trained - last, trained)])[0]}
        places = [(trained - last, trained), (longest - last, longest)]
        with _reading(fit.pretrained, reading, options):
            within, beyond = fit.loss(tokens, places)
        return {"loss@within": within, "loss@beyond": beyond}


class PretrainedFit:
    """A model that is not trained; its state is nothing.

    Args:
        options: of the task's fit.
    """

    def __init__(self, options: Options) -> None:
        kind, device = str(options["model"]), training_device(options)
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(str(options["dtype"]))
        if dtype is None:
            raise TrialError(f"unknown dtype {options['dtype']!r}; known: bfloat16, float32")
        if kind not in ("smollm2", "random"):
            raise TrialError(f"unknown model {kind!r}; known: smollm2, random")
        self._tokenizer: Any = None
        if kind == "smollm2":
            self.pretrained, self._tokenizer = load_smollm2(dtype)
        else:
            self.pretrained = _random_model()
        # Of the base class: a decorated `to` of transformers has lost its types.
        model: nn.Module = self.pretrained
        self.model = nn.Module.to(model, device=device, dtype=dtype).eval()

    def document(self, index: int, length: int) -> Tensor:
        """The first `length` tokens of a document that has as many."""
        passed = 0
        for text in (_reference(), *_sources()):
            # No token of text is shorter than a byte, and few are longer than eight.
            if len(text) < length:
                continue
            tokens = self._tokens(text[: 8 * length])
            if len(tokens) < length:
                continue
            if passed == index:
                return tokens[:length]
            passed += 1
        raise TrialError(f"there are {passed} documents of {length} tokens, so no document {index}")

    def loss(self, tokens: Tensor, places: list[tuple[int, int]]) -> list[float]:
        """Mean loss of the predictions at each range of positions; the last token is a target only."""
        tokens = tokens.to(self.pretrained.device)
        hidden = self.pretrained.base_model(input_ids=tokens[None, :-1], use_cache=False).last_hidden_state[0]
        head: Any = self.pretrained.get_output_embeddings()
        losses = (F.cross_entropy(head(hidden[a:b]).float(), tokens[a + 1 : b + 1]) for a, b in places)
        return [float(loss) for loss in losses]

    def _tokens(self, text: str) -> Tensor:
        if self._tokenizer is None:
            return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        # It would warn that the text is longer than the model.
        return torch.tensor(self._tokenizer(text, verbose=False)["input_ids"])

    def step(self, index: int) -> dict[str, float]:
        """There is nothing to train."""
        raise TrialError("a pretrained model is not trained: the number of steps must be 0")

    def state(self) -> dict[str, object]:
        """Nothing: the model is in the user's cache."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """Nothing to restore."""

    def optimizer_state(self) -> Iterator[Tensor]:
        """None."""
        return iter(())


class _reading:  # noqa: N801
    """Read with a cure inside the block, as before after it."""

    def __init__(self, model: "PreTrainedModel", reading: str, options: Options) -> None:
        self._model, self._kind, self._options = model, reading, options
        self._undo: list[Any] = []

    def __enter__(self) -> None:
        model, trained = self._model, int(self._model.config.max_position_embeddings)
        if self._kind in _FREQUENCIES:
            rotary: Any = model.base_model.rotary_emb
            original = rotary.inv_freq
            stretched = rope_frequencies(
                2 * len(original),
                base=float(model.config.rope_parameters["rope_theta"]),
                method=_FREQUENCIES[self._kind],  # pyrefly: ignore[bad-argument-type]
                factor=float(self._options["reach"]),
            )
            rotary.inv_freq = stretched.to(original)
            self._undo.append(lambda: setattr(rotary, "inv_freq", original))
        elif self._kind == "window":
            from transformers import AttentionInterface

            AttentionInterface.register(_WINDOW, _attend_in_window)
            before = str(model.config._attn_implementation)
            model.set_attn_implementation(_WINDOW)
            self._undo.append(lambda: model.set_attn_implementation(before))
        elif self._kind == "rerope":
            from danlu.integrations.transformers import patch_rope

            window = max(1, round(float(self._options["window"]) * trained))
            logn = "post" if self._options["logn"] else None
            self._undo.append(patch_rope(model, window=window, logn=logn).remove)

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()


def _attend_in_window(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function of transformers: the last T keys, without padding and without a cache."""
    window = int(module.config.max_position_embeddings)
    return window_attention(query, key, value, window=window, scale=scaling).transpose(1, 2).contiguous(), None


def window_attention(query: Tensor, key: Tensor, value: Tensor, *, window: int, scale: float) -> Tensor:
    """Causal attention to the last `window` keys; queries and keys are rotated already.

    The first `window` rows are one causal call, the others tiles with a mask, so no mask of all pairs is held.
    """
    first = [x[:, :, :window] for x in (query, key, value)]
    out = [F.scaled_dot_product_attention(*first, is_causal=True, scale=scale, enable_gqa=True)]  # pyrefly: ignore[bad-argument-type]
    for low in range(window, query.shape[2], _TILE):
        high, start = min(low + _TILE, query.shape[2]), low - window + 1
        slots = torch.arange(start, high, device=query.device)
        distance = slots[low - start :, None] - slots
        visible = (distance >= 0) & (distance < window)
        out.append(
            F.scaled_dot_product_attention(
                query[:, :, low:high],
                key[:, :, start:high],
                value[:, :, start:high],
                attn_mask=visible,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(out, 2)


def _random_model() -> "PreTrainedModel":
    """A Llama of two layers with a vocabulary of bytes, always the same one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@cache
def _reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@cache
def _sources() -> tuple[str, ...]:
    """Source files that people wrote, in the order of their hashes."""
    corpus = python_source()
    written = [x for x in (*corpus.train, *corpus.validation, *corpus.test) if b"generated" not in x[:400].lower()]
    return tuple(x.decode("utf-8", "replace") for x in sorted(written, key=lambda x: hashlib.sha256(x).digest()))
