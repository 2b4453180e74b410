"""The tasks of the simplex maps measure what they say and resume exactly."""

import math

import pytest
import torch

from danlu.lab.errors import TrialError
from danlu.lab.tasks.sparse_attention import _MAPS, SparseAttention, weight_metrics
from danlu.lab.tasks.sparse_outputs import SparseOutputs, output_metrics

OUTPUTS = ["softmax", "entmax15", "sparsemax", "sparse_softmax", "taylor_softmax", "perturb_normal"]
CASES = [(SparseOutputs(), {"output": name}) for name in OUTPUTS] + [(SparseAttention(), {"map": m}) for m in _MAPS]


def started(task, seed: int = 0, **changes):
    options = {**task.fit_options, "width": 16, "lr": 0.01, **changes}
    return task.start(seed=seed, steps=8, options=options), options


@pytest.mark.parametrize(("task", "changes"), CASES, ids=lambda one: str(one) if isinstance(one, dict) else one.name)
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(task, changes):
    whole, options = started(task, **changes)
    points = [whole.step(i) for i in range(6)]
    assert all(math.isfinite(point["train_loss"]) for point in points)
    half, _ = started(task, **changes)
    assert [half.step(i) for i in range(3)] == points[:3]
    rest, _ = started(task, **changes)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for first, second in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(first, second)
    other, _ = started(task, seed=1, **changes)
    assert other.step(0) != points[0]
    metrics = task.evaluate(whole, seed=0, split="test", options=options)
    assert 0 <= metrics["accuracy"] <= 1


def test_output_metrics_of_constructed_values():
    p = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.2, 0.8], [0.0, 0.0, 1.0]], dtype=torch.float64)
    metrics = output_metrics(p, torch.tensor([1, 2, 0]))
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["support"] == pytest.approx(5 / 3)
    assert metrics["true_in_support"] == pytest.approx(2 / 3)
    assert metrics["expected_calibration_error"] == pytest.approx((0.6 + 0.2 + 1.0) / 3)


def test_weight_metrics_of_constructed_values():
    metrics = weight_metrics(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    assert metrics["nonzero"] == 2.5
    assert metrics["perplexity"] == pytest.approx(2.0)


def test_sparse_maps_read_fewer_pixels_and_the_pooling_is_attention():
    found = {}
    for name in ("softmax", "entmax15", "sparsemax"):
        fit, options = started(SparseAttention(), map=name)
        found[name] = SparseAttention().evaluate(fit, seed=0, split="test", options=options)["nonzero"]
    assert found["softmax"] == 64
    assert found["sparsemax"] <= found["entmax15"] <= 64
    fit, _ = started(SparseAttention(), map="sparsemax")
    images = torch.rand(3, 64)
    weights, logits = fit.model.weights_and_logits(images)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))
    assert torch.equal(fit.model(images), logits)


def test_unknown_choices():
    with pytest.raises(TrialError, match="unknown output 'argmax'; known: softmax, entmax15"):
        started(SparseOutputs(), output="argmax")
    with pytest.raises(TrialError, match="unknown map 'argmax'; known: softmax, taylor_softmax"):
        started(SparseAttention(), map="argmax")
