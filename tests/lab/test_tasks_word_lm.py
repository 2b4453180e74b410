"""The word model measures what it says, resumes exactly, and its trial runs."""

import pytest
import torch
from torch.nn import functional as F

from danlu.lab.errors import TrialError
from danlu.lab.tasks.word_lm import WordLM, WordModel, _batch, _counts, _stream, tokens_of
from danlu.optim import HybridOptimizer, Lion, Tiger

SMALL = {"types": 300, "megabytes": 0.2, "width": 8, "hidden": 16, "batch_size": 16, "places": 64}
TASK = WordLM()


def options(**changes):
    return {**TASK.fit_options, **TASK.evaluate_options, **SMALL, **changes}


def start(chosen, steps=6, seed=0):
    return TASK.start(seed=seed, steps=steps, options=chosen)


def test_words_and_their_numbers():
    assert tokens_of("def f(x1):\n\treturn -x1") == ["def", "f", "(", "x1", ")", ":", "return", "-", "x1"]
    text = _stream("train", 300, 0.2)
    counts = torch.bincount(text, minlength=300)
    assert (counts[1:-1] >= counts[2:]).all()  # row 0 holds the rest
    assert counts[0] > 0
    assert _stream("test", 300, 0.2).max() < 300


def test_batches_stream_once_through_the_text():
    chosen, text = options(), torch.arange(10_000)
    for step in range(5):
        batch = _batch(text, 0, step, 5, chosen)
        assert batch.shape == (16, 9)
        assert (batch[:, 1:] - batch[:, :-1] == 1).all()
        assert step * 1998 <= batch[:, 0].min()
        assert batch[:, 0].max() < (step + 1) * 1998
    with pytest.raises(TrialError, match="has no 5 parts"):
        _batch(torch.arange(10), 0, 0, 5, chosen)


def test_counts_are_those_of_the_batches():
    chosen = options()
    text = _stream("train", 300, 0.2)
    expected = torch.zeros(300, dtype=torch.int64)
    for step in range(4):
        for word in _batch(text, 3, step, 4, chosen)[:, :-1].flatten().tolist():
            expected[word] += 1
    assert torch.equal(_counts(3, 4, chosen), expected)


@pytest.mark.parametrize("remedy", ["none", "lazy", "tied", "adamw", "whole_rms"])
def test_fit_resumes_bit_for_bit(remedy):
    chosen = options(optimizer="tiger", remedy=remedy, lr=0.02)
    whole = start(chosen)
    points = [whole.step(i) for i in range(6)]
    half = start(chosen)
    for i in range(3):
        assert half.step(i) == points[i]
    rest = start(chosen)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for first, second in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_remedies_are_what_they_say():
    lazy = start(options(optimizer="tiger", remedy="lazy")).optimizer
    assert isinstance(lazy, Tiger)
    assert lazy.param_groups[0]["lazy"] == ("embedding",)
    hybrid = start(options(optimizer="tiger", remedy="adamw", lr=0.1, embedding_lr=0.3)).optimizer
    assert isinstance(hybrid, HybridOptimizer)
    assert {g["kind"]: g["peak_lr"] for g in hybrid.param_groups} == {
        "embedding": 0.3,
        "norm_scale": 0.1,
        "vector": 0.1,
        "matrix": 0.1,
    }
    tied = start(options(optimizer="lion", remedy="tied"))
    assert isinstance(tied.optimizer, Lion)
    assert tied.model.head.weight is tied.model.embedding.weight
    whole = start(options(optimizer="tiger", remedy="whole_rms")).optimizer
    assert [g["kind"] for g in whole.param_groups] == ["norm_scale", "vector", "matrix"]


def test_metrics_of_a_constructed_model():
    chosen = options()
    fit = start(chosen, 4)
    for i in range(4):
        fit.step(i)
    model = fit.model
    with torch.no_grad():
        model.embedding.weight.fill_(0.5)
        model.embedding.weight[7] = -2.0
        for parameter in (model.head.weight, model.head.bias):
            parameter.zero_()
    found = TASK.evaluate(fit, seed=0, split="test", options=chosen)
    uniform = float(F.cross_entropy(torch.zeros(1, 300), torch.tensor([0])))
    assert found["loss"] == pytest.approx(uniform, rel=1e-6)
    assert found["loss@rare_contexts"] == pytest.approx(uniform, rel=1e-6)
    assert 0 < found["loss@fine_tuned"] < uniform
    assert found["largest_component"] == 2.0
    assert found["share_of_large_rows"] == pytest.approx(1 / 300)
    assert torch.equal(model.head.weight, torch.zeros(300, 8))  # fine-tuning was on a copy
    assert TASK.evaluate(fit, seed=0, split="test", options=chosen) == found


def test_model_shapes():
    model = WordModel(types=20, context=3, width=4, hidden=5)
    assert model(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 20)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"remedy": "more"}, "unknown remedy 'more'; known: none"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; known: adamw"),
        ({"remedy": "lazy"}, "AdamW has no lazy rows"),
        ({"optimizer": "lion", "remedy": "whole_rms"}, "one of Tiger's"),
    ],
)
def test_bad_options(changes, match):
    with pytest.raises(TrialError, match=match):
        start(options(**changes))
