"""The data set: frequencies, labels, subsets, determinism, evaluation, learning times."""

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from danlu.diagnostics import MultitaskSparseParity, learning_times

DATA = MultitaskSparseParity(n_tasks=40, n_bits=20, k=3, gamma=0.6, seed=3)


def parity(task, bits, data=DATA):
    """A model that knows every task."""
    return 40.0 * (bits.gather(1, data.subsets[task]).sum(1) % 2).float() - 20.0


def test_frequencies_of_tasks():
    weight = [(t + 1) ** -1.6 for t in range(40)]
    expected = torch.tensor(weight, dtype=torch.float64) / sum(weight)
    torch.testing.assert_close(DATA.probabilities, expected, rtol=1e-13, atol=0.0)
    task, _, _ = DATA.sample(200_000)
    counts = torch.bincount(task, minlength=40)
    assert chisquare(counts.numpy(), (expected * 200_000).numpy()).pvalue > 1e-3
    # The test can fail: the frequencies of another exponent are told apart.
    other = MultitaskSparseParity(40, 20, 3, 0.65).probabilities
    assert chisquare(counts.numpy(), (other * 200_000).numpy()).pvalue < 1e-6


@pytest.mark.parametrize("n_bits", [1, 7, 8, 9, 32, 57, 64, 100])
def test_bits_are_fair_and_independent(n_bits):
    _, bits, _ = MultitaskSparseParity(1, n_bits, 1, 1.0).sample(40_000)
    assert bits.shape == (40_000, n_bits)
    assert bits.dtype == torch.uint8
    assert set(bits.unique().tolist()) == {0, 1}
    spins = 1 - 2 * bits.double()
    # Means and pairwise products within 5 standard deviations of 0.
    assert spins.mean(0).abs().max() < 5 / 200
    product = spins.T @ spins / 40_000
    assert (product - torch.eye(n_bits)).abs().max() < 5 / 200


def test_labels_are_the_xor_of_the_bits_of_the_task():
    task, bits, label = DATA.sample(500)
    for t, x, y in zip(task.tolist(), bits.tolist(), label.tolist(), strict=True):
        expected = 0
        for place in DATA.subsets[t].tolist():
            expected ^= x[place]
        assert y == expected
    assert (task.dtype, label.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize(("n_tasks", "n_bits", "k"), [(40, 20, 3), (10, 5, 2), (10, 5, 3), (1, 3, 3), (190, 20, 2)])
def test_subsets_are_distinct_sorted_and_in_range(n_tasks, n_bits, k):
    subsets = MultitaskSparseParity(n_tasks, n_bits, k, 0.5).subsets
    assert subsets.shape == (n_tasks, k)
    assert len(set(map(tuple, subsets.tolist()))) == n_tasks
    assert subsets.min() >= 0
    assert subsets.max() < n_bits
    assert (subsets.diff() > 0).all()


def test_a_seed_names_everything_and_batches_need_no_history():
    again = MultitaskSparseParity(n_tasks=40, n_bits=20, k=3, gamma=0.6, seed=3)
    assert torch.equal(DATA.subsets, again.subsets)
    for first, second in zip(DATA.sample(100), again.sample(100), strict=True):
        assert torch.equal(first, second)
    other = MultitaskSparseParity(n_tasks=40, n_bits=20, k=3, gamma=0.6, seed=4)
    assert not torch.equal(DATA.subsets, other.subsets)
    assert not torch.equal(DATA.sample(100)[1], other.sample(100)[1])
    whole = list(itertools.islice(DATA.batches(16), 5))
    late = next(DATA.batches(16, start=4))
    assert all(torch.equal(a, b) for a, b in zip(whole[4], late, strict=True))
    drawn = [batch[1] for batch in whole] + [DATA.sample(16)[1], other.sample(16)[1], next(other.batches(16))[1]]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    own = [DATA.sample(16, generator=torch.Generator().manual_seed(9))[1] for _ in range(2)]
    assert torch.equal(*own)


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    data = MultitaskSparseParity(40, 20, 3, 0.6)
    data.sample(10)
    next(data.batches(4))
    data.evaluate(parity, samples_per_task=2)
    assert torch.equal(torch.rand(3), expected)


def test_long_samples_are_filled_to_the_end():
    task, bits, label = DATA.sample(20_001)
    assert (len(task), len(bits), len(label)) == (20_001,) * 3
    torch.testing.assert_close(label, bits.gather(1, DATA.subsets[task]).sum(1) % 2, check_dtype=False)
    assert abs(float(bits[-1000:].double().mean()) - 0.5) < 0.02
    assert [len(part) for part in DATA.sample(0)] == [0, 0, 0]


def test_evaluation():
    known = DATA.evaluate(parity, samples_per_task=32)
    assert float(known.loss.max()) < 1e-8
    assert (known.accuracy == 1).all()
    guess = DATA.evaluate(lambda task, bits: torch.zeros(len(task)), samples_per_task=32)
    torch.testing.assert_close(guess.loss, torch.full((40,), math.log(2), dtype=torch.float64))
    assert guess.mean_loss == pytest.approx(math.log(2))
    # A model of the first five tasks: the mean loss is the tail of the frequencies, as in the quanta model.
    partial = DATA.evaluate(lambda task, bits: torch.where(task < 5, parity(task, bits), 0.0), samples_per_task=300)
    assert partial.mean_loss == pytest.approx(math.log(2) * float(DATA.probabilities[5:].sum()), rel=1e-6)
    again = DATA.evaluate(lambda task, bits: bits[:, 0] - 0.5, samples_per_task=300)
    assert torch.equal(again.loss, DATA.evaluate(lambda task, bits: bits[:, 0] - 0.5, samples_per_task=300).loss)
    # Every task has samples of its own, also across chunks: a wrong assignment would blur these.
    by_task = DATA.evaluate(lambda task, bits: task.float(), samples_per_task=300)
    labels_one = (by_task.loss - torch.nn.functional.softplus(torch.arange(40.0).double())) / -torch.arange(40.0)
    assert (labels_one[1:] - 0.5).abs().max() < 5 * 0.5 / math.sqrt(300)


def test_learning_times_by_hand():
    steps = torch.tensor([10.0, 100.0, 1000.0, 10000.0])
    losses = torch.tensor(
        [
            [0.1, 0.7, 0.7, math.nan, 0.7],
            [0.1, 0.3, 0.7, 0.7, math.inf],
            [0.1, 0.1, 0.6, 0.2, 0.1],
            [0.7, 0.1, 0.5, 0.1, 0.1],
        ],
        dtype=torch.float64,
    )
    found = learning_times(steps, losses, threshold=0.5).tolist()
    # 0.7 -> 0.3 crosses 0.5 half-way in log t; 0.5 itself is not below 0.5.
    assert found == pytest.approx([10.0, 10**1.5, math.inf, 10 ** (2 + 0.2 / 0.5), 1000.0])
    curve = torch.tensor([[0.7, 0.6], [0.34, 0.35]])
    assert learning_times([1.0, 2.0], curve).isfinite().tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"n_tasks": 191, "n_bits": 20, "k": 2}, ValueError, "n_tasks must be at most 190, .* got 191"),
        ({"k": 21}, ValueError, "k must be at most n_bits=20, got 21"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"n_bits": 0}, ValueError, "n_bits must be at least 1"),
        ({"n_tasks": 2.0}, TypeError, "n_tasks must be an int"),
        ({"gamma": 0.0}, ValueError, "gamma must be in"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_options(changes, error, match):
    with pytest.raises(error, match=match):
        MultitaskSparseParity(**{"n_tasks": 40, "n_bits": 20, "k": 3, "gamma": 0.6, **changes})


def test_bad_arguments():
    curve = torch.ones(2, 3)
    for call, error, match in [
        (lambda: DATA.sample(-1), ValueError, "count must be at least 0"),
        (lambda: DATA.batches(0), ValueError, "batch_size must be at least 1"),
        (lambda: DATA.batches(1, start=-1), ValueError, "start must be at least 0"),
        (lambda: DATA.evaluate(parity, samples_per_task=0), ValueError, "samples_per_task must be at least 1"),
        (lambda: DATA.evaluate(lambda t, b: b.float()), ValueError, "predict must return one logit a sample"),
        (lambda: learning_times([1.0], curve), ValueError, r"losses must be \(1, tasks\)"),
        (lambda: learning_times([], curve[:0]), ValueError, "losses must be"),
        (lambda: learning_times([1.0, 1.0], curve), ValueError, "steps must be positive and strictly increasing"),
        (lambda: learning_times([0.0, 1.0], curve), ValueError, "steps must be positive and strictly increasing"),
        (lambda: learning_times([1.0, 2.0], curve.long()), TypeError, "losses must be a floating-point tensor"),
        (lambda: learning_times([1.0, 2.0], curve, threshold=0.0), ValueError, "threshold must be in"),
    ]:
        with pytest.raises(error, match=match):
            call()
