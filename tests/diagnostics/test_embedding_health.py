"""Health of an embedding: values on constructed tables, scipy's rank correlation, hard cases, errors."""

import math

import pytest
import scipy.stats
import torch

from danlu.diagnostics import embedding_health
from danlu.optim import Tiger


def test_constructed_table():
    weight = torch.full((10, 4), 0.02)
    weight[3] = 0.21  # more than 10 times the median
    weight[4] = 0.199  # not more
    weight[5, 1] = -60.0
    found = embedding_health(weight, 0.01)
    assert found.max_component == 60.0
    assert found.bound == 100.0
    assert found.share_near_bound == 1 / 40
    assert found.large_rows == 2
    assert found.share_of_large_rows == 0.2
    assert found.median_rms == pytest.approx(0.02)
    assert found.rank_correlation is None


def test_rank_correlation_is_that_of_scipy():
    torch.manual_seed(1)
    weight, counts = torch.randn(200, 5), torch.randint(6, (200,))  # many ties
    weight[:20] = 0.5
    found = embedding_health(weight, 0.01, counts=counts).rank_correlation
    rms = weight.double().square().mean(1).sqrt()
    assert found == pytest.approx(scipy.stats.spearmanr(rms, counts).statistic, abs=1e-12)


def test_finds_the_anomaly_that_tiger_makes():
    weight = torch.nn.Parameter(torch.full((50, 8), 0.02))
    optimizer = Tiger([{"params": [weight], "kind": "embedding"}], lr=5e-3, weight_decay=0.1)
    counts = torch.zeros(50)
    for step in range(1500):
        weight.grad = torch.zeros_like(weight)
        weight.grad[1:] = (-1.0) ** step
        weight.grad[0] = -1.0 if step == 0 else 0.0
        counts[1:] += 1
        counts[0] += step == 0
        optimizer.step()
    found = embedding_health(weight, 0.1, counts=counts)
    assert found.large_rows == 1
    assert found.share_near_bound == 1 / 50
    assert found.max_component > 5.0
    assert found.rank_correlation < 0


def test_hard_tables():
    zeros = embedding_health(torch.zeros(3, 2), 0.01, counts=torch.arange(3))
    assert (zeros.max_component, zeros.large_rows, zeros.median_rms, zeros.rank_correlation) == (0.0, 0, 0.0, None)
    for shape in ((0, 4), (3, 0)):
        empty = embedding_health(torch.zeros(shape), 0.01, counts=torch.zeros(shape[0]))
        assert (empty.max_component, empty.large_rows, empty.share_near_bound) == (0.0, 0, 0.0)
    one = embedding_health(torch.ones(1, 2), 0.01, counts=torch.ones(1))
    assert one.rank_correlation is None
    no_decay = embedding_health(torch.full((2, 2), 1e30), 0.0)
    assert no_decay.bound == math.inf
    assert no_decay.share_near_bound == 0.0
    assert no_decay.max_component == pytest.approx(1e30)
    bad = torch.ones(4, 2)
    bad[0, 0] = math.nan
    found = embedding_health(bad, 0.01)
    assert math.isnan(found.max_component)
    assert (found.median_rms, found.large_rows) == (1.0, 0)
    half = embedding_health(torch.full((4, 2), 3e4, dtype=torch.float16), 0.01)
    assert half.median_rms == pytest.approx(3e4, rel=1e-3)  # its square does not fit into float16


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([[1.0]], 0.01), TypeError, "weight must be a torch.Tensor, got list"),
        ((torch.ones(2, 2).long(), 0.01), TypeError, "weight must be a floating-point tensor"),
        ((torch.ones(2), 0.01), ValueError, r"weight must be a matrix of rows, got shape \(2,\)"),
        ((torch.ones(2, 2), -0.1), ValueError, r"weight_decay must be in \[0, inf\), got -0.1"),
        ((torch.ones(2, 2), "0.1"), TypeError, "weight_decay must be a real number"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        embedding_health(*arguments)


def test_counts_of_another_length():
    with pytest.raises(ValueError, match=r"counts must have shape \(2,\), got \(3,\)"):
        embedding_health(torch.ones(2, 2), 0.1, counts=torch.ones(3))


@pytest.mark.parametrize("counts", [[1, 2], torch.ones(2, dtype=torch.complex64)])
def test_counts_that_are_no_real_tensor(counts):
    with pytest.raises(TypeError, match=r"counts must be a real tensor, got (list|torch\.complex64)"):
        embedding_health(torch.ones(2, 2), 0.1, counts=counts)
