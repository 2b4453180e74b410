"""Extraction of nested spans from the statements of Python source, by a recurrent encoder and a span scorer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from danlu.attention import EfficientGlobalPointer, GlobalPointer, decode_spans
from danlu.diagnostics import SpanScores, span_f1
from danlu.lab.errors import TrialError
from danlu.lab.python_spans import KINDS, Statement, python_spans
from danlu.lab.tasks.optimizers import OPTIMIZER_OPTIONS, make_optimizer, set_learning_rate
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, Scalar
from danlu.losses import multilabel_cross_entropy, rdrop

__all__ = ["NestedSpans", "SpanModel"]

_PADDING, _UNKNOWN = 0, 1
_VOCABULARY = 1000
_HEADS = {"global_pointer": GlobalPointer, "efficient": EfficientGlobalPointer}


class SpanModel(nn.Module):
    """Embedding, a bidirectional GRU, and a scorer of spans."""

    def __init__(self, head: nn.Module, *, words: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the spans of every kind, shape (B, T, n, n)."""
        mask = tokens != _PADDING
        lengths = mask.sum(1).cpu()
        packed = pack_padded_sequence(
            self.dropout(self.embedding(tokens)), lengths, batch_first=True, enforce_sorted=False
        )
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=tokens.shape[1])
        return self.head(self.dropout(hidden), mask)


@dataclass(frozen=True)
class NestedSpans:
    """Calls, subscripts, attributes, comparisons, binary operations and collections in statements of unseen files.

    `train` statements are drawn anew for every seed, from 2000. `head` is "global_pointer" or "efficient", `loss` is
    "zlpr" (the multi-label cross entropy) or "bce" (a sigmoid per span, summed). With 2 `passes` the loss is R-Drop's,
    with the weight `rdrop` and the divergence of the given `kind`; a weight of 0 leaves the mean loss of two dropouts.
    `threshold` is where scores are cut.

    Metrics on exact spans of all kinds: `f1`, `precision`, `recall`, and `recall@nested` of the spans that lie within
    another one.
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "nested_spans"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        own: dict[str, Scalar] = {
            "head": "global_pointer",
            "rope": True,
            "loss": "zlpr",
            "passes": 1,
            "rdrop": 0.0,
            "kind": "bernoulli",
            "train": 600,
            "width": 64,
            "head_size": 32,
            "dropout": 0.2,
            "batch_size": 16,
            "device": "cpu",
        }
        return {**OPTIMIZER_OPTIONS, **own}

    @property
    def evaluate_options(self) -> Options:
        """Where scores are cut."""
        return {"threshold": 0.0}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        data = python_spans()
        return {"name": data.name, "sha256": data.sha256, "license": data.license, "split": data.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device, batch_size = training_device(options), int(options["batch_size"])
        pool = python_spans().train
        count = int(options["train"])
        if not 1 <= count <= len(pool):
            raise TrialError(f"train must be from 1 to {len(pool)} statements, got {count}")
        chosen = torch.randperm(len(pool), generator=generator("statements", seed))[:count].tolist()
        statements = [pool[i] for i in chosen]
        torch.manual_seed(seed)
        model = SpanModel(
            _head(options), words=_VOCABULARY, width=int(options["width"]), dropout=float(options["dropout"])
        ).to(device)
        weight, kind, passes = float(options["rdrop"]), _kind(options), int(options["passes"])
        if passes not in (1, 2) or (passes == 1 and weight):
            raise TrialError(f"R-Drop needs 2 passes, got passes={passes} with rdrop={weight}")

        def loss(step: int) -> Tensor:
            rows = torch.randint(count, (batch_size,), generator=generator("batch", seed, step)).tolist()
            tokens, spans = _batch([statements[i] for i in rows], device)
            # Dropout draws from torch's own generator.
            torch.manual_seed(generator("dropout", seed, step).initial_seed())
            of_scores = _Loss(str(options["loss"]), tokens, spans)
            if passes == 1:
                return of_scores(model(tokens).flatten(-2))
            return rdrop(
                lambda: model(tokens).flatten(-2), of_scores, weight=weight, kind=kind, normalizer=float(len(tokens))
            )

        optimizer = make_optimizer(model, options)
        return GradientFit(
            model, optimizer, loss=loss, schedule=lambda step: set_learning_rate(optimizer, options, step, steps)
        )

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        data = python_spans()
        statements = data.validation if split == "validation" else data.test
        device = training_device(options)
        fit.model.eval()
        total, nested = SpanScores(0, 0, 0), SpanScores(0, 0, 0)
        for begin in range(0, len(statements), 64):
            part = statements[begin : begin + 64]
            tokens, spans = _batch(part, device)
            found = decode_spans(fit.model(tokens), tokens != _PADDING, threshold=float(options["threshold"])).cpu()
            total = total + span_f1(found, spans)
            nested = nested + span_f1(found, spans[_within_another(spans)])
        return {
            "f1": total.f1,
            "precision": total.precision,
            "recall": total.recall,
            "recall@nested": nested.recall,
        }


class _Loss:
    """Loss of flattened scores, summed over spans and kinds, mean over statements."""

    def __init__(self, name: str, tokens: Tensor, spans: Tensor) -> None:
        if name not in ("zlpr", "bce"):
            raise TrialError(f"unknown loss {name!r}; known: zlpr, bce")
        self._name, self._count, length = name, tokens.shape[0], tokens.shape[1]
        target = torch.zeros(self._count, len(KINDS), length, length, dtype=torch.bool)
        target[tuple(spans.T)] = True
        self._target = target.flatten(-2).to(tokens.device)

    def __call__(self, scores: Tensor) -> Tensor:
        if self._name == "zlpr":
            return multilabel_cross_entropy(scores, self._target, normalizer=float(self._count))
        # Of a score of -inf the sigmoid is 0 and so is the loss, but not as this function computes it.
        hidden = scores.isinf()
        rows = F.binary_cross_entropy_with_logits(
            scores.masked_fill(hidden, 0.0), self._target.to(scores.dtype), reduction="none"
        )
        return rows.masked_fill(hidden, 0.0).sum() / self._count


def _head(options: Options) -> nn.Module:
    name = str(options["head"])
    if name not in _HEADS:
        raise TrialError(f"unknown head {name!r}; known: {', '.join(_HEADS)}")
    return _HEADS[name](
        2 * int(options["width"]), len(KINDS), head_size=int(options["head_size"]), rope=bool(options["rope"])
    )


def _kind(options: Options) -> Literal["bernoulli", "softmax"]:
    kind = str(options["kind"])
    if kind not in ("bernoulli", "softmax"):
        raise TrialError(f"unknown kind {kind!r}; known: bernoulli, softmax")
    return cast("Literal['bernoulli', 'softmax']", kind)


@lru_cache(maxsize=1)
def _numbers() -> dict[str, int]:
    """Numbers of the most frequent tokens of the training statements, the others being unknown."""
    counts = Counter(word for one in python_spans().train for word in one.tokens)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))[: _VOCABULARY - 2]
    return {word: i + 2 for i, word in enumerate(ordered)}


def _batch(statements: Sequence[Statement], device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded tokens, and the spans as (statement, kind, first, last)."""
    numbers = _numbers()
    tokens = torch.full((len(statements), max(len(one.tokens) for one in statements)), _PADDING)
    spans: list[tuple[int, int, int, int]] = []
    for i, one in enumerate(statements):
        tokens[i, : len(one.tokens)] = torch.tensor([numbers.get(word, _UNKNOWN) for word in one.tokens])
        spans += [(i, *span) for span in one.spans]
    return tokens.to(device), torch.tensor(spans, dtype=torch.int64).view(-1, 4)


def _within_another(spans: Tensor) -> Tensor:
    """Which spans lie within a longer one of their statement."""
    sample, _, first, last = spans.unbind(1)
    inside = (sample[:, None] == sample) & (first[:, None] >= first) & (last[:, None] <= last)
    shorter = (last - first)[:, None] < (last - first)
    return (inside & shorter).any(1)
