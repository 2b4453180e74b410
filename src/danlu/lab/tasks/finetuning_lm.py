"""Fine-tuning of a small pretrained word model with other losses, judged by its text as well as by its likelihood."""

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from danlu.lab.checkpoint import load_state, save_state
from danlu.lab.data import cache_folder, python_source
from danlu.lab.errors import TrialError
from danlu.lab.tasks.training import GradientFit, generator, training_device
from danlu.lab.trial import Fit, Options, digest
from danlu.losses import EMO, CrossEntropy, TaiLr, linear_loss

__all__ = ["FinetuningLM", "TrigramModel", "WordTransformer"]

Split = Literal["train", "validation", "test"]
# Shorter pretraining is not worth a file.
_CACHED_STEPS = 100
_PROMPT, _CONTINUATION = 16, 32


@dataclass(frozen=True)
class FinetuningLM:
    """A transformer over words, pretrained on docstrings, fine-tuned on Python's language reference.

    Pretraining: cross entropy on all docstrings of the standard library, the same model for every arm and seed; it is
    kept in the user's cache. Fine-tuning: the texts of `pydoc_data.topics`, 70 / 12 / 18 % of the topics by hash; the
    seed draws the batches. The `types` most frequent words of both training texts have a row, the rest share row 0.

    `loss` is "cross_entropy", "emo" with `mode`, `shift_target`, `max_ratio` (0 for none) and `cost` ("embedding": a
    frozen copy of the pretrained head, or "zero_one", the same weighting without any geometry), or "tailr" with `gamma`
    and `min_weight`.

    Metrics: `perplexity` and `accuracy` of the next word on held-out topics; of continuations of held-out prompts,
    sampled at `temperature`: `trigram_precision` (share of their trigrams that occur in real text),
    `trigram_perplexity` (under an interpolated trigram model of real text), `distinct_trigrams` (share of different
    ones).
    """

    @property
    def name(self) -> str:
        """Name for tables."""
        return "finetuning_lm"

    @property
    def fit_options(self) -> Options:
        """Options of the fit."""
        return {
            "loss": "cross_entropy",
            "mode": "ce_anchored",
            "cost": "embedding",
            "shift_target": False,
            "max_ratio": 0.0,
            "gamma": 0.1,
            "min_weight": 0.2,
            "lr": 1.5e-3,
            "batch_size": 8,
            "context": 64,
            "types": 2000,
            "width": 96,
            "layers": 2,
            "heads": 4,
            "pretraining_steps": 1000,
            "device": "cpu",
        }

    @property
    def evaluate_options(self) -> Options:
        """Options of the evaluation."""
        return {"temperature": 1.0, "samples": 64}

    def data(self) -> Mapping[str, str]:
        """What the numbers rest on."""
        source = python_source()
        texts = "\0".join(text for split in ("train", "validation", "test") for text in _topics(split))
        return {
            "name": f"docstrings and language reference of {source.name}",
            "sha256": hashlib.sha256((source.sha256 + texts).encode()).hexdigest(),
            "license": source.license,
            "split": "by topic: SHA-256 of its name mod 100, below 70 train, below 82 validation, else test",
        }

    def start(self, *, seed: int, steps: int, options: Options) -> Fit:
        """A new fit."""
        device = training_device(options)
        model = _model(options)
        model.load_state_dict(_pretrained(_identity(options)))
        model.to(device)
        # One group: the model is too small for decay to matter.
        optimizer = AdamW(model.parameters(), lr=float(options["lr"]), betas=(0.9, 0.95), weight_decay=0.01)
        words = _words("train", int(options["types"]))
        row_loss = _row_loss(options, model.embedding.weight.detach().clone())

        def loss(step: int) -> Tensor:
            window = _windows(words, options, generator("batch", seed, step)).to(device)
            return linear_loss(model(window[:, :-1]), model.embedding.weight, window[:, 1:], row_loss)

        def schedule(step: int) -> None:
            # Linear, over a tenth up and the rest down to zero.
            factor = min((step + 1) / max(1, steps // 10), (steps - step) / steps)
            for group in optimizer.param_groups:
                group["lr"] = float(options["lr"]) * factor

        return GradientFit(model, optimizer, loss=loss, schedule=schedule)

    @torch.no_grad()
    def evaluate(
        self, fit: Fit, *, seed: int, split: Literal["validation", "test"], options: Options
    ) -> Mapping[str, float]:
        """Metrics on one split."""
        model = fit.model
        if not isinstance(model, WordTransformer):
            raise TypeError(f"FinetuningLM evaluates a WordTransformer, not {type(model).__name__}")
        model.eval()
        device, types, context = training_device(options), int(options["types"]), int(options["context"])
        words = _words(split, types).to(device)
        windows = words[: (len(words) - 1) // context * context + 1].unfold(0, context + 1, context)
        nll, right = 0.0, 0
        for part in windows.split(32):
            logits = F.linear(model(part[:, :-1]), model.embedding.weight)
            nll += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
            right += int((logits.argmax(-1) == part[:, 1:]).sum())
        count = windows.shape[0] * context
        starts = torch.randint(
            len(words) - _PROMPT, (int(options["samples"]), 1), generator=generator("prompts", split)
        )
        prompts = words[starts.to(device) + torch.arange(_PROMPT, device=device)]
        text = _sample(model, prompts, float(options["temperature"]), context, generator("samples", seed)).cpu()
        real = _real_text(types)
        return {
            "perplexity": float(torch.tensor(nll / count).exp()),
            "accuracy": right / count,
            "trigram_precision": real.precision(text),
            "trigram_perplexity": real.perplexity(text),
            "distinct_trigrams": distinct_trigrams(text[:, _PROMPT - 2 :], types),
        }


class WordTransformer(nn.Module):
    """Pre-norm decoder over words with learned positions, whose head is its embedding.

    Args:
        types: number of words.
        width: of the residual stream.
        layers: number of blocks.
        heads: of every block.
        context: largest number of words.
    """

    def __init__(self, *, types: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(types, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, words: Tensor) -> Tensor:
        """Hidden states `(batch, length, width)` of words `(batch, length)`; the embedding makes logits of them."""
        length = words.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=words.device)
        hidden = self.embedding(words) + self.positions[:length]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.norm(hidden)


class TrigramModel:
    """An interpolated trigram model: 0.6 trigram, 0.3 bigram, 0.09 word, 0.01 uniform.

    Args:
        words: the text.
        types: number of words that there are.
    """

    def __init__(self, words: Tensor, types: int) -> None:
        self.types = types
        self.counts = [torch.unique(self._grams(words[None], n)[0], return_counts=True) for n in (1, 2, 3)]
        self.total = len(words)

    def _grams(self, text: Tensor, n: int) -> Tensor:
        """Numbers of the n-grams of every row."""
        last = text.shape[1] - n + 1
        return sum(
            (text[:, i : i + last] * self.types ** (n - 1 - i) for i in range(n)), torch.zeros((), dtype=torch.int64)
        )

    def _count(self, grams: Tensor, n: int) -> Tensor:
        known, counts = self.counts[n - 1]
        place = torch.searchsorted(known, grams).clamp(max=len(known) - 1)
        return torch.where(known[place] == grams, counts[place], torch.zeros_like(grams)).double()

    def precision(self, text: Tensor) -> float:
        """Share of the trigrams that occur, of those that end behind the prompt."""
        return float((self._count(self._grams(text, 3), 3)[:, _PROMPT - 2 :] > 0).double().mean())

    def perplexity(self, text: Tensor) -> float:
        """Perplexity of what stands behind the prompt."""
        first, second, third = (self._count(self._grams(text, n), n) for n in (1, 2, 3))
        before = second[:, :-1]
        p = 0.6 * third / before.clamp(min=1) + 0.3 * second[:, 1:] / first[:, 1:-1].clamp(min=1)
        p = p + 0.09 * first[:, 2:] / self.total + 0.01 / self.types
        return float(p.log()[:, _PROMPT - 2 :].mean().neg().exp())


def distinct_trigrams(text: Tensor, types: int) -> float:
    """Share of different trigrams among all of `text` `(rows, length)`."""
    grams = text[:, :-2] * types**2 + text[:, 1:-1] * types + text[:, 2:]
    return len(torch.unique(grams)) / grams.numel()


def _row_loss(options: Options, head: Tensor) -> CrossEntropy | EMO | TaiLr:
    name = options["loss"]
    if name == "cross_entropy":
        return CrossEntropy()
    if name == "tailr":
        return TaiLr(float(options["gamma"]), min_weight=float(options["min_weight"]))
    if name != "emo":
        raise TrialError(f"unknown loss {name!r}; known: cross_entropy, emo, tailr")
    if options["cost"] not in ("embedding", "zero_one"):
        raise TrialError(f"unknown cost {options['cost']!r}; known: embedding, zero_one")
    geometry = options["cost"] == "embedding"
    return EMO(
        cost_embedding=head if geometry else None,
        cost_matrix=None if geometry else 1 - torch.eye(len(head), device=head.device),
        mode=str(options["mode"]),  # pyrefly: ignore[bad-argument-type]
        shift_target=bool(options["shift_target"]),
        max_ratio=float(options["max_ratio"]) or None,
    )


def _windows(words: Tensor, options: Options, random: torch.Generator) -> Tensor:
    context = int(options["context"])
    starts = torch.randint(len(words) - context, (int(options["batch_size"]), 1), generator=random)
    return words[starts + torch.arange(context + 1)]


def _model(options: Options) -> WordTransformer:
    names = ("types", "width", "layers", "heads", "context")
    return WordTransformer(**{name: int(options[name]) for name in names})


def _sample(
    model: WordTransformer, prompts: Tensor, temperature: float, context: int, random: torch.Generator
) -> Tensor:
    """Prompts with sampled continuations."""
    text = prompts
    for _ in range(_CONTINUATION):
        last = model(text[:, -context:])[:, -1]
        logits = F.linear(last, model.embedding.weight) / temperature
        # Row 0 stands for many words; a text has none of it.
        logits[:, 0] = -torch.inf
        chosen = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=random)
        text = torch.cat((text, chosen.to(text.device)), 1)
    return text


# ---------------------------------------------------------------------------------------------------- pretraining


def _identity(options: Options) -> str:
    """Everything that the pretrained weights depend on."""
    names = ("batch_size", "context", "types", "width", "layers", "heads", "pretraining_steps")
    return repr({name: int(options[name]) for name in names})


@cache
def _pretrained(identity: str) -> Mapping[str, Tensor]:
    """Weights of the pretrained model; in the user's cache if they took long."""
    options = cast("dict[str, int]", ast.literal_eval(identity))
    steps = options["pretraining_steps"]
    if steps < _CACHED_STEPS:
        return _pretrain(options, steps)
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    key = digest([identity, python_source().sha256, torch.__version__, code])
    path = cache_folder() / "pretrained" / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            save_state(path, dict(_pretrain(options, steps)))
        return cast("Mapping[str, Tensor]", load_state(path))


@torch.enable_grad()
def _pretrain(options: Mapping[str, int], steps: int) -> Mapping[str, Tensor]:
    torch.manual_seed(0)
    model = _model(options)
    optimizer = AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    words = _docstring_words(options["types"])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / max(1, steps // 20), 1.1 - step / steps)
        # Twice the batch of fine-tuning, in turns.
        window = torch.cat([_windows(words, options, generator("pretraining", step, half)) for half in range(2)])
        loss = linear_loss(model(window[:, :-1]), model.embedding.weight, window[:, 1:], CrossEntropy())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# ----------------------------------------------------------------------------------------------------------- text


def _tokens(text: str) -> list[str]:
    return re.findall(r"[a-z_]+|[0-9]+|[^\sa-z0-9_]", text.lower())


@cache
def _topics(split: Split) -> tuple[str, ...]:
    from pydoc_data.topics import topics

    def split_of(name: str) -> Split:
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
        return "train" if bucket < 70 else "validation" if bucket < 82 else "test"

    return tuple(text for name, text in sorted(topics.items()) if split_of(name) == split)


@cache
def _docstrings() -> tuple[str, ...]:
    found: list[str] = []
    for document in python_source().train:
        try:
            tree = ast.parse(document)
        except (SyntaxError, ValueError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        found += [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
    return tuple(found)


@cache
def _vocabulary(types: int) -> Mapping[str, int]:
    counts = Counter(word for text in (*_docstrings(), *_topics("train")) for word in _tokens(text))
    # Ties by the word itself, so that the order does not depend on that of the files.
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return {word: i for i, (word, _) in enumerate(ranked[: types - 1], start=1)}


def _encoded(texts: tuple[str, ...], types: int) -> Tensor:
    known = _vocabulary(types)
    return torch.tensor([known.get(word, 0) for text in texts for word in _tokens(text)])


@cache
def _words(split: Split, types: int) -> Tensor:
    return _encoded(_topics(split), types)


@cache
def _docstring_words(types: int) -> Tensor:
    return _encoded(_docstrings(), types)


@cache
def _real_text(types: int) -> TrigramModel:
    """All there is, also what no model was trained on."""
    splits: tuple[Split, ...] = ("train", "validation", "test")
    return TrigramModel(torch.cat([_docstring_words(types), *(_words(split, types) for split in splits)]), types)
