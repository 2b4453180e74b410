"""Nested spans: exact resume, padding that changes nothing, metrics with known values, arms that differ as they say."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from danlu.attention import EfficientGlobalPointer, GlobalPointer
from danlu.lab.errors import TrialError
from danlu.lab.python_spans import python_spans
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.nested_spans import NestedSpans, _batch, _Loss, _within_another
from danlu.losses import multilabel_cross_entropy

TASK = NestedSpans()


def options(**changes):
    small = {"train": 40, "width": 8, "head_size": 4, "batch_size": 4}
    return {**TASK.fit_options, **TASK.evaluate_options, **small, **changes}


def start(chosen, steps=6, seed=0):
    return TASK.start(seed=seed, steps=steps, options=chosen)


@pytest.mark.parametrize(
    "changes",
    [{}, {"head": "efficient", "rope": False}, {"loss": "bce"}, {"passes": 2, "rdrop": 1.0, "kind": "softmax"}],
)
def test_fit_resumes_bit_for_bit(changes):
    chosen = options(**changes)
    whole = start(chosen)
    points = [whole.step(i) for i in range(6)]
    half = start(chosen)
    for i in range(3):
        assert half.step(i) == points[i]
    rest = start(chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    torch.manual_seed(99)  # dropout is that of the step
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for first, second in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_the_arms_are_what_they_say():
    assert isinstance(start(options()).model.head, GlobalPointer)
    assert isinstance(start(options(head="efficient")).model.head, EfficientGlobalPointer)
    assert start(options(rope=False)).model.head.rope is None
    points = {name: start(options(**changes)).step(0)["train_loss"] for name, changes in {
        "one": {}, "two": {"passes": 2}, "rdrop": {"passes": 2, "rdrop": 1.0},
        "softmax": {"passes": 2, "rdrop": 1.0, "kind": "softmax"}, "bce": {"loss": "bce"},
    }.items()}  # fmt: skip
    assert len(set(points.values())) == 5
    # A divergence is added to the same two passes; that of a softmax is another one.
    assert points["two"] < points["rdrop"]
    assert points["two"] < points["softmax"]
    still = {name: start(options(dropout=0.0, **changes)).step(0)["train_loss"] for name, changes in {
        "one": {}, "two": {"passes": 2}, "rdrop": {"passes": 2, "rdrop": 1.0}}.items()}  # fmt: skip
    assert still["one"] == pytest.approx(still["two"], rel=1e-6)
    assert still["one"] == pytest.approx(still["rdrop"], rel=1e-6)


def test_losses():
    statements = python_spans().train[:5]
    tokens, spans = _batch(statements, torch.device("cpu"))
    visible = (tokens != 0)[:, None, :, None] & (tokens != 0)[:, None, None, :]
    visible = visible.triu().expand(-1, 6, -1, -1)
    scores = torch.randn(visible.shape).masked_fill(~visible, float("-inf"))
    target = torch.zeros(visible.shape)
    for i, one in enumerate(statements):
        for kind, first, last in one.spans:
            target[i, kind, first, last] = 1
    bce = F.binary_cross_entropy_with_logits(scores[visible], target[visible], reduction="sum") / 5
    torch.testing.assert_close(_Loss("bce", tokens, spans)(scores.flatten(-2)), bce)
    zlpr = multilabel_cross_entropy(scores.flatten(-2), target.flatten(-2), reduction="none").sum(1).mean()
    torch.testing.assert_close(_Loss("zlpr", tokens, spans)(scores.flatten(-2)), zlpr)


def test_padding_changes_no_score():
    model = start(options()).model.eval()
    statements = python_spans().train[:8]
    together = model(_batch(statements, torch.device("cpu"))[0])
    for i, one in enumerate(statements):
        alone = model(_batch([one], torch.device("cpu"))[0])[0]
        n = len(one.tokens)
        torch.testing.assert_close(together[i, :, :n, :n], alone, rtol=1e-5, atol=1e-6)


class Known(nn.Module):
    """Scores every span of the truth above the threshold, and some others."""

    def __init__(self, statements, miss_nested=False):
        super().__init__()
        self.statements, self.miss_nested, self.place = statements, miss_nested, 0

    def forward(self, tokens):
        scores = torch.full((len(tokens), 6, tokens.shape[1], tokens.shape[1]), -1.0)
        spans = _batch(self.statements[self.place : self.place + len(tokens)], torch.device("cpu"))[1]
        self.place += len(tokens)
        kept = ~_within_another(spans) if self.miss_nested else torch.ones(len(spans), dtype=torch.bool)
        scores[tuple(spans[kept].T)] = 1.0
        return scores


def test_metrics_of_known_scores():
    fit, chosen = start(options()), options()
    test = python_spans().test
    fit.model = Known(test)
    assert TASK.evaluate(fit, seed=0, split="test", options=chosen) == {
        "f1": 1.0,
        "precision": 1.0,
        "recall": 1.0,
        "recall@nested": 1.0,
    }
    fit.model = Known(test, miss_nested=True)
    found = TASK.evaluate(fit, seed=0, split="test", options=chosen)
    assert found["precision"] == 1
    assert found["recall@nested"] == 0
    assert found["f1"] == pytest.approx(2 * found["recall"] / (1 + found["recall"]))
    fit.model = Known(test)
    nothing = TASK.evaluate(fit, seed=0, split="test", options={**chosen, "threshold": 2.0})
    assert (nothing["f1"], nothing["recall"]) == (0, 0)


def test_within_another():
    spans = torch.tensor([[0, 0, 0, 5], [0, 1, 1, 2], [0, 2, 0, 5], [1, 0, 1, 2], [0, 3, 4, 6]])
    assert _within_another(spans).tolist() == [False, True, False, False, False]


@pytest.mark.trial
def test_trial_runs_at_ci_size(tmp_path):
    with Store(tmp_path) as store:
        outcome = run_trial("global_pointer", size="ci", store=store)
    assert len(outcome.arms) == 7
    for arm in outcome.arms:
        assert {"f1", "precision", "recall", "recall@nested"} <= arm.metrics.keys()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"head": "biaffine"}, "unknown head 'biaffine'; known: global_pointer"),
        ({"kind": "gauss"}, "unknown kind 'gauss'; known: bernoulli"),
        ({"train": 10**6}, "train must be from 1 to"),
        ({"rdrop": 1.0}, "R-Drop needs 2 passes"),
        ({"passes": 3}, "R-Drop needs 2 passes"),
    ],
)
def test_bad_options(changes, match):
    with pytest.raises(TrialError, match=match):
        start(options(**changes))


def test_unknown_loss():
    with pytest.raises(TrialError, match="unknown loss 'focal'; known: zlpr, bce"):
        start(options(loss="focal")).step(0)
