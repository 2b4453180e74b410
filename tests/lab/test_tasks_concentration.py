"""Associative recall asks for what it says, and resumes exactly."""

import math

import pytest
import torch

from danlu.diagnostics import attention_sparsity
from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.associative_recall import AssociativeRecall, _draw, recall_weights
from danlu.lab.tasks.training import generator

KERNELS = ["softmax", "elu1", "relu2"]
TASK = AssociativeRecall()


def started(kernel: str = "softmax", seed: int = 0, steps: int = 8, **changes):
    options = {**TASK.fit_options, **TASK.evaluate_options, "kernel": kernel, "lr": 0.01, **changes}
    return TASK.start(seed=seed, steps=steps, options=options), options


SMALL = {"width": 16, "batch_size": 8, "pairs": 16, "samples": 32}


@pytest.mark.parametrize("kernel", KERNELS)
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(kernel):
    whole, options = started(kernel, **SMALL)
    points = [whole.step(i) for i in range(6)]
    assert all(math.isfinite(point["train_loss"]) for point in points)
    half, _ = started(kernel, **SMALL)
    assert [half.step(i) for i in range(3)] == points[:3]
    rest, _ = started(kernel, **SMALL)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for first, second in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert started(kernel, seed=1, **SMALL)[0].step(0) != points[0]
    metrics = TASK.evaluate(whole, seed=0, split="test", options=options)
    assert metrics.keys() == {f"{name}@{p}" for name in ("accuracy", "n_eff", "zero") for p in (4, 8, 16)} | {
        "accuracy"
    }
    assert metrics == TASK.evaluate(whole, seed=3, split="test", options=options)
    assert metrics["accuracy"] == pytest.approx(sum(metrics[f"accuracy@{p}"] for p in (4, 8, 16)) / 3)


def test_the_answer_is_the_value_of_the_key_that_is_asked_for():
    pairs, asked, answer = _draw(50, 32, generator("x"))
    assert pairs.shape == (50, 32, 2)
    for sample in range(50):
        book = dict(pairs[sample].tolist())
        assert len(book) == 32
        assert book[int(asked[sample])] == answer[sample]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel):
    query, key = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 9, 4, dtype=torch.float64)
    weights = recall_weights(kernel, query, key)
    scores = torch.einsum("bmd,bnd->bmn", query, key) / 2
    raw = {
        "softmax": scores.exp(),
        "relu2": scores.clamp(min=0) ** 2,
        "elu1": torch.einsum("bmd,bnd->bmn", *(torch.where(x > 0, x + 1, x.exp()) for x in (query, key))),
    }[kernel]
    torch.testing.assert_close(weights, raw / raw.sum(-1, keepdim=True))


def test_a_row_that_relu_empties_reads_nothing():
    weights = recall_weights("relu2", torch.ones(1, 4), -torch.ones(3, 4))
    assert (weights == 0).all()
    assert attention_sparsity(weights).isnan().all()


def test_softmax_learns_what_linear_attention_cannot():
    accuracy = {}
    for kernel in ("softmax", "elu1"):
        fit, options = started(kernel, steps=300, pairs=32, batch_size=64, samples=512)
        for i in range(300):
            fit.step(i)
        accuracy[kernel] = TASK.evaluate(fit, seed=0, split="test", options=options)
    assert accuracy["softmax"]["accuracy@32"] > accuracy["elu1"]["accuracy@32"] + 0.2
    assert accuracy["softmax"]["n_eff@32"] < 0.5 * accuracy["elu1"]["n_eff@32"]


@pytest.mark.trial
def test_trial_runs_at_ci_size(tmp_path):
    with Store(tmp_path) as store:
        outcome = run_trial("attention/concentration", size="ci", store=store)
    assert [arm.name for arm in outcome.arms] == KERNELS
    for arm in outcome.arms:
        assert {"accuracy", "accuracy@128", "n_eff@128", "zero@4"} <= arm.metrics.keys()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kernel": "cosine"}, "unknown kernel 'cosine'; known: softmax, elu1, relu2"),
        ({"pairs": 24}, "pairs must be a power of 2 from 4 to 512, got 24"),
        ({"pairs": 1024}, "got 1024"),
    ],
)
def test_unknown_choices(changes, match):
    with pytest.raises(TrialError, match=match):
        started(**changes)
