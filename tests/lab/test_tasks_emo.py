"""The fine-tuning task: its text metrics by hand and exact resume; the losses of the digits."""

import pytest
import torch

from danlu.lab.errors import TrialError
from danlu.lab.tasks import finetuning_lm
from danlu.lab.tasks.finetuning_lm import FinetuningLM, TrigramModel, distinct_trigrams

SMALL = {
    "pretraining_steps": 3,
    "types": 150,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "batch_size": 2,
    "context": 24,
    "samples": 4,
}


def options(**changes):
    task = FinetuningLM()
    return {**task.fit_options, **task.evaluate_options, **SMALL, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "emo"},
        {"loss": "emo", "cost": "zero_one", "mode": "pure"},
        {"loss": "emo", "mode": "emo_anchored", "shift_target": True},
        {"loss": "tailr"},
    ],
    ids=str,
)
def test_resumes_bit_for_bit_and_starts_from_one_model(changes):
    task, chosen = FinetuningLM(), options(**changes)
    whole = task.start(seed=0, steps=4, options=chosen)
    other = task.start(seed=1, steps=4, options=chosen)
    for first, second in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(first, second)
    points = [whole.step(i) for i in range(4)]
    assert other.step(0) != points[0]
    half = task.start(seed=0, steps=4, options=chosen)
    assert [half.step(i) for i in range(2)] == points[:2]
    rest = task.start(seed=0, steps=4, options=chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(2, 4)] == points[2:]


def test_metrics_and_temperature():
    task, chosen = FinetuningLM(), options()
    fit = task.start(seed=0, steps=4, options=chosen)
    found = task.evaluate(fit, seed=0, split="test", options=chosen)
    assert found == task.evaluate(fit, seed=0, split="test", options=chosen)
    assert set(found) == {
        "perplexity",
        "accuracy",
        "trigram_precision",
        "trigram_perplexity",
        "distinct_trigrams",
    }
    assert 1 < found["perplexity"] < 400
    cold = task.evaluate(fit, seed=0, split="test", options={**chosen, "temperature": 0.01})
    # The temperature is one of sampling only.
    assert cold["perplexity"] == found["perplexity"]
    assert cold["distinct_trigrams"] < found["distinct_trigrams"]


def test_trigrams_by_hand():
    # Prompts have 16 words, so the continuation is what stands behind them.
    prompt = torch.zeros(1, 16, dtype=torch.int64)
    words = torch.tensor([0, 0, 1, 2, 3, 1, 2, 3])
    real = TrigramModel(words, types=5)
    text = torch.cat((prompt, torch.tensor([[1, 2, 4]])), 1)
    # (0, 0, 1) and (0, 1, 2) occur, (1, 2, 4) does not.
    assert real.precision(text) == pytest.approx(2 / 3)
    p = [
        0.6 * 1 / 1 + 0.3 * 1 / 2 + 0.09 * 2 / 8 + 0.01 / 5,
        0.6 * 1 / 1 + 0.3 * 2 / 2 + 0.09 * 2 / 8 + 0.01 / 5,
        0.01 / 5,
    ]
    assert real.perplexity(text) == pytest.approx((p[0] * p[1] * p[2]) ** (-1 / 3))
    assert distinct_trigrams(torch.tensor([[1, 2, 3, 1, 2, 3]]), 5) == pytest.approx(3 / 4)


def test_topics_are_split_without_overlap():
    parts = [set(finetuning_lm._topics(split)) for split in ("train", "validation", "test")]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_long_pretraining_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(finetuning_lm, "_CACHED_STEPS", 2)
    chosen = options(pretraining_steps=2)
    identity = finetuning_lm._identity(chosen)
    made = finetuning_lm._pretrained.__wrapped__(identity)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    monkeypatch.setattr(finetuning_lm, "_pretrain", None)
    kept = finetuning_lm._pretrained.__wrapped__(identity)
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[name], kept[name]) for name in made)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"loss": "focal"}, "unknown loss 'focal'; known: cross_entropy, emo, tailr"),
        ({"loss": "emo", "cost": "tree"}, "unknown cost 'tree'; known: embedding, zero_one"),
    ],
)
def test_unknown_options(change, match):
    with pytest.raises(TrialError, match=match):
        FinetuningLM().start(seed=0, steps=2, options=options(**change))


def test_losses_of_the_digits():
    """Smoothing, the power and the rise of gamma reach the loss."""
    from torch.nn import functional as F

    from danlu.lab.tasks.digits import Digits, _loss
    from danlu.losses import generalized_cross_entropy, tailr_loss

    logits, labels = torch.randn(5, 10), torch.arange(5)
    base = Digits().fit_options

    def value(step, **changes):
        return _loss({**base, **changes}, 100)(step, logits, labels)

    assert value(0, smoothing=0.3) == F.cross_entropy(logits, labels, label_smoothing=0.3)
    assert value(0, loss="generalized_cross_entropy", q=0.4) == generalized_cross_entropy(logits, labels, q=0.4)
    for step, gamma in ((0, 0.0), (25, 0.2), (50, 0.4), (99, 0.4)):
        expected = tailr_loss(logits, labels, gamma=gamma)
        torch.testing.assert_close(value(step, loss="tailr", gamma=0.4, gamma_rise=0.5), expected)
        assert value(step, loss="tailr", gamma=gamma) == expected
