"""A word-level language model on the standard library's source, for what optimizers do to the rows of rare words."""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from danlu.diagnostics import embedding_health
from danlu.lab.data import TextCorpus, python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options
from danlu.optim import HybridOptimizer, Lion, Tiger, parameter_groups, tie_embeddings

__all__ = ["WordLM", "WordModel", "tokens_of"]

# Standard deviation of the embedding at the start.
_INITIAL = 0.1
_FINE_TUNING_STEPS = 100


@dataclass(frozen=True)
class WordLM:
    """Prediction of the next word from `context` words by a network with one hidden layer.

    Words are identifiers, numbers and single punctuation marks; the `types` most frequent of the training text have a
    row each, and the rest share row 0. Training streams once through the text: step t draws its `batch_size` places
    from the t-th of as many equal parts of it, so rare words come in bursts, as in a large corpus.

    Metrics: `loss` (nats per word, fixed places of held-out files), `loss@rare_contexts` (places whose context holds a
    type that training saw at most 3 times, but at least once), `loss@fine_tuned` (after 100 steps of AdamW on such
    places of one half of the held-out files, on such places of the other half), and of the input embedding:
    `largest_component`, `share_of_large_rows` (RMS beyond 10 times that of the start), `rank_correlation` of RMS and
    count.

    `remedy` says what is done about the embedding: "none"; "lazy" rows; "tied" to the output; "adamw" for it alone,
    with rate `embedding_lr`; "whole_rms" (Tiger's scale from the whole matrix).
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "word_lm"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {
            "optimizer": "adamw",
            "remedy": "none",
            "lr": 1e-3,
            "embedding_lr": 2e-3,
            "weight_decay": 0.01,
            "context": 8,
            "batch_size": 128,
            "types": 8000,
            "megabytes": 5.0,
            "width": 64,
            "hidden": 256,
            "device": "cpu",
        }

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"places": 4096, "fine_tuning_lr": 1e-3}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        corpus = _corpus()
        return {"name": corpus.name, "sha256": corpus.sha256, "license": corpus.license, "split": corpus.split_rule}

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        torch.manual_seed(seed)
        model = WordModel(
            types=int(options["types"]),
            context=int(options["context"]),
            width=int(options["width"]),
            hidden=int(options["hidden"]),
        )
        if options["remedy"] == "tied":
            tie_embeddings(model)
        model.to(device)
        optimizer = _optimizer(model, options)
        text = _stream("train", int(options["types"]), float(options["megabytes"]))

        def loss(step: int) -> Tensor:
            window = _batch(text, seed, step, steps, options).to(device)
            return F.cross_entropy(model(window[:, :-1]), window[:, -1])

        def schedule(step: int) -> None:
            # A function of the step alone, so that a resumed fit needs no state of a scheduler; constant at the end,
            # since the anomaly is a matter of the sum of the rates.
            factor = min(1.0, (step + 1) / max(1, steps // 20))
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

        fit = GradientFit(model, optimizer, loss=loss, schedule=schedule)
        fit.memory = {"steps": steps}
        return fit

    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        model = fit.model
        if not isinstance(model, WordModel):
            raise TypeError(f"WordLM evaluates a WordModel, not {type(model).__name__}")
        types, context = int(options["types"]), int(options["context"])
        device = training_device(options)
        steps = int(str(fit.state()["memory"]["steps"]))  # pyrefly: ignore[bad-index]
        counts = _counts(seed, steps, options)
        text = _stream(split, types, float(options["megabytes"]))
        windows = text.unfold(0, context + 1, 1)
        rare = ((counts > 0) & (counts <= 3))[windows[:, :-1]].any(1).nonzero()[:, 0]
        if len(rare) < 2:
            raise TrialError(f"no context of the {split} text holds a word that training saw 1 to 3 times")
        middle = len(windows) // 2
        places = int(options["places"])
        # Places are the same for every arm of a seed, and `every` for all seeds: differences are those of models.
        every = windows[torch.randint(len(windows), (places,), generator=generator("places", split))]
        metrics = {"loss": _loss(model, every.to(device))}
        metrics["loss@rare_contexts"] = _loss(model, windows[rare[:places]].to(device))
        tuned = _fine_tuned(model, windows[rare[rare < middle]], seed, options)
        metrics["loss@fine_tuned"] = _loss(tuned, windows[rare[rare >= middle + context][:places]].to(device))
        table = model.embedding.weight.detach()
        health = embedding_health(table, float(options["weight_decay"]), counts=counts.to(table.device))
        rms = table.square().mean(1).sqrt()
        metrics["largest_component"] = health.max_component
        metrics["share_of_large_rows"] = float((rms > 10 * _INITIAL).double().mean())
        metrics["rank_correlation"] = health.rank_correlation or 0.0
        return metrics


class WordModel(nn.Module):
    """Embedding, one hidden layer over the whole context, output of the embedding's width, logits.

    Args:
        types: number of words.
        context: words seen.
        width: of the embedding.
        hidden: of the hidden layer.
    """

    def __init__(self, *, types: int, context: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(types, width)
        self.up = nn.Linear(context * width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, types)
        nn.init.normal_(self.embedding.weight, std=_INITIAL)

    def forward(self, words: Tensor) -> Tensor:
        """Logits `(batch, types)` of the next word for `(batch, context)`."""
        hidden = F.gelu(self.up(self.embedding(words).flatten(1)))
        return self.head(self.norm(self.down(hidden)))


def _optimizer(model: WordModel, options: Options) -> Optimizer:
    name, remedy = str(options["optimizer"]), str(options["remedy"])
    lr, weight_decay = float(options["lr"]), float(options["weight_decay"])
    if remedy not in ("none", "lazy", "tied", "adamw", "whole_rms"):
        raise TrialError(f"unknown remedy {remedy!r}; known: none, lazy, tied, adamw, whole_rms")
    if remedy == "whole_rms" and name != "tiger":
        raise TrialError("the remedy 'whole_rms' is one of Tiger's")
    groups = parameter_groups(
        model,
        weight_decay=weight_decay,
        overrides={"embedding.weight": "matrix"} if remedy == "whole_rms" else None,
    )
    for group in groups:
        group["peak_lr"] = lr
    lazy = ("embedding",) if remedy == "lazy" else ()
    if name == "adamw":
        if remedy == "lazy":
            raise TrialError("AdamW has no lazy rows here")
        return AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    rules: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
        "lion": (Lion, {"lr": lr, "betas": (0.95, 0.98), "lazy": lazy}),
        "tiger": (Tiger, {"lr": lr, "lazy": lazy}),
    }
    if name not in rules:
        raise TrialError(f"unknown optimizer {name!r}; known: adamw, lion, tiger")
    cls, own = rules[name]
    if remedy != "adamw":
        return cls(groups, **own)
    for group in groups:
        if group["kind"] == "embedding":
            group["peak_lr"] = float(options["embedding_lr"])
    adamw = (AdamW, {"lr": float(options["embedding_lr"]), "betas": (0.9, 0.95)})
    return HybridOptimizer(groups, {"embedding": adamw, "default": (cls, own)})


@cache
def _corpus() -> TextCorpus:
    return python_source()


def tokens_of(text: str) -> list[str]:
    """Identifiers and numbers, and every other visible character by itself."""
    return re.findall(r"\w+|[^\w\s]", text)


@cache
def _words(split: Literal["train", "validation", "test"], megabytes: float) -> tuple[str, ...]:
    documents = {"train": _corpus().train, "validation": _corpus().validation, "test": _corpus().test}[split]
    # Whole files at regular distances; held-out text is taken as it is.
    total = sum(map(len, documents))
    stride = max(1, round(total / (megabytes * 1e6))) if split == "train" else 1
    return tuple(word for document in documents[::stride] for word in tokens_of(document.decode(errors="replace")))


@cache
def _stream(split: Literal["train", "validation", "test"], types: int, megabytes: float) -> Tensor:
    counted = Counter(_words("train", megabytes))
    # Ties are broken by the word, so that the numbering is a function of the text.
    ordered = sorted(counted, key=lambda word: (-counted[word], word))[: types - 1]
    number = {word: i + 1 for i, word in enumerate(ordered)}
    return torch.tensor([number.get(word, 0) for word in _words(split, megabytes)])


def _batch(text: Tensor, seed: int, step: int, steps: int, options: Options) -> Tensor:
    context, batch_size = int(options["context"]), int(options["batch_size"])
    part = (len(text) - context) // steps
    if part < 1:
        raise TrialError(f"a text of {len(text)} words has no {steps} parts")
    starts = torch.randint(part, (batch_size, 1), generator=generator("batch", seed, step)) + step * part
    return text[starts + torch.arange(context + 1)]


def _counts(seed: int, steps: int, options: Options) -> Tensor:
    """How often training saw every type in a context."""
    text = _stream("train", int(options["types"]), float(options["megabytes"]))
    seen = torch.cat([_batch(text, seed, step, steps, options)[:, :-1].flatten() for step in range(steps)])
    return torch.bincount(seen, minlength=int(options["types"]))


@torch.no_grad()
def _loss(model: WordModel, windows: Tensor) -> float:
    model.eval()
    total = 0.0
    for chunk in windows.split(1024):
        total += float(F.cross_entropy(model(chunk[:, :-1]), chunk[:, -1], reduction="sum"))
    return total / len(windows)


def _fine_tuned(model: WordModel, windows: Tensor, seed: int, options: Options) -> WordModel:
    tuned = copy.deepcopy(model).train()
    optimizer = AdamW(parameter_groups(tuned), lr=float(options["fine_tuning_lr"]))
    for step in range(_FINE_TUNING_STEPS):
        rows = torch.randint(len(windows), (64,), generator=generator("fine-tuning", seed, step))
        batch = windows[rows].to(training_device(options))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(tuned(batch[:, :-1]), batch[:, -1]).backward()
        optimizer.step()
    return tuned
