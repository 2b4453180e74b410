"""Intervals, tests and verdicts: against theory, against brute force, and on null comparisons."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.lab.runner import run_trial
from danlu.lab.stats import holm, paired_difference, power, verdict, weigh
from danlu.lab.store import Store
from danlu.lab.trial import Comparison

LOWER = Comparison(candidate="a", baseline="b", metric="loss", better="lower")


def test_interval_against_hand_computation():
    first, second = [1.0, 2.0, 4.0], [0.5, 1.0, 2.0]
    differences = np.array([0.5, 1.0, 2.0])
    half = 4.302652729911275 * differences.std(ddof=1) / math.sqrt(3)  # t quantile of 0.975 with 2 degrees of freedom
    result = paired_difference(first, second)
    assert result.count == 3
    assert result.mean == pytest.approx(differences.mean())
    assert result.low == pytest.approx(differences.mean() - half)
    assert result.high == pytest.approx(differences.mean() + half)
    assert result.sign_flip is None


@given(st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=6, max_size=8))
def test_sign_flip_equals_brute_force(values):
    result = paired_difference(values, [0.0] * len(values))
    mean = np.mean(values)
    flips = [np.mean(np.multiply(values, signs)) for signs in itertools.product((1, -1), repeat=len(values))]
    expected = np.mean([abs(flip) >= abs(mean) - 1e-9 for flip in flips])
    assert result.sign_flip == pytest.approx(min(1.0, expected), abs=2.5 / 2 ** len(values))


def test_sign_flip_reaches_its_floor():
    assert paired_difference([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0] * 6).sign_flip == pytest.approx(2 / 64)


def test_constant_differences_are_exact():
    result = paired_difference([8.0] * 5, [4.0] * 5)
    assert (result.low, result.mean, result.high) == (4.0, 4.0, 4.0)
    part = weigh(Comparison(candidate="a", baseline="b", metric="bytes", better="lower"), [4.0] * 5, [8.0] * 5)
    assert (part.p_better, part.p_worse) == (0.0, 1.0)
    assert weigh(LOWER, [8.0] * 5, [8.0] * 5).p_better == 1.0


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [([1.0], [1.0], "two pairs"), ([1.0, 2.0], [1.0], "pairs are needed"), ([1.0, math.nan], [1.0, 1.0], "finite")],
)
def test_bad_scores(first, second, match):
    with pytest.raises(ValueError, match=match):
        paired_difference(first, second)


def test_diverged_fit_counts_against_its_arm():
    assert weigh(LOWER, [math.nan, 1.0, 1.0], [1.0, 1.1, 1.2]).p_worse == 0.0
    both = weigh(LOWER, [math.nan, 1.0, 1.0], [math.inf, 1.1, 1.2])
    assert (both.p_better, both.p_worse) == (1.0, 1.0)


def test_margin_shifts_the_question():
    worse_by_a_little = [1.010, 1.011, 1.009, 1.012, 1.008]
    strict = weigh(LOWER, worse_by_a_little, [1.0] * 5)
    tolerant = weigh(Comparison(**{**vars(LOWER), "margin": 0.02}), worse_by_a_little, [1.0] * 5)
    assert strict.p_better > 0.99
    assert tolerant.p_better < 0.01
    assert strict.gain == tolerant.gain
    assert strict.gain.mean == pytest.approx(-0.01)


def test_holm_against_hand_computation():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({}) == {}


def _part(p_better: float):
    return weigh(LOWER, [1.0, 1.1, 0.9], [1.0, 1.0, 1.0]).__class__(
        LOWER, paired_difference([1.0, 2.0], [0.0, 0.0]), p_better, 1 - p_better
    )


@pytest.mark.parametrize(
    ("p_values", "word"),
    [
        ([0.001], "holds"),
        ([0.001, 0.02], "holds"),
        ([0.001, 0.5], "holds in part"),
        ([0.02, 0.5], "not resolved at this scale"),
        ([0.5, 0.4], "not resolved at this scale"),
        ([0.999], "does not hold"),
        ([0.999, 0.5], "does not hold"),
        ([0.98, 0.5], "not resolved at this scale"),
        ([0.001, 0.999], "holds in part"),
    ],
)
def test_verdict(p_values, word):
    assert verdict([_part(p) for p in p_values]) == word


def covered(differences: np.ndarray) -> np.ndarray:
    """For every row of differences, whether its interval covers zero."""
    found = [paired_difference(row.tolist(), [0.0] * len(row)) for row in differences]
    return np.array([one.low <= 0.0 <= one.high for one in found])


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_null_comparisons_are_covered_as_often_as_claimed(seeds):
    random = np.random.default_rng(seeds)
    assert 0.925 <= covered(random.normal(size=(1000, seeds))).mean() <= 0.975


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 5), (2.0, 5), (1.0, 10), (0.5, 10), (3.0, 3)])
def test_planted_effects_are_found_as_often_as_theory_says(effect, seeds):
    random = np.random.default_rng(0)
    found = 1 - covered(random.normal(effect, 1.0, size=(1000, seeds))).mean()
    expected = power(effect, seeds)
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 1000))


@pytest.fixture(scope="module")
def stored_differences(tmp_path_factory) -> np.ndarray:
    """Differences between fits of one arm on different seeds, through the runner and the store, on real data."""
    with Store(tmp_path_factory.mktemp("control")) as store:
        outcome = run_trial(str(Path(__file__).with_name("control_trial.py")), size="ci", store=store)
    (part,) = outcome.parts
    assert outcome.verdict == "not resolved at this scale"
    assert part.gain.mean == part.gain.low == part.gain.high == 0.0
    scores = list(outcome.arms[0].metrics[part.comparison.metric].values())
    differences = np.subtract(scores[0::2], scores[1::2])
    assert len(differences) == 120
    assert (differences != 0).all()
    return differences


def _draws(differences: np.ndarray, count: int, seeds: int) -> np.ndarray:
    """Null comparisons made of stored pairs; which of the two runs comes first is a coin's choice."""
    random = np.random.default_rng(1)
    rows = np.stack([random.choice(len(differences), seeds, replace=False) for _ in range(count)])
    return differences[rows] * random.choice([-1.0, 1.0], size=rows.shape)


def test_control_on_stored_scores(stored_differences):
    """The same arm twice: nothing may be found more often than the level allows, nor less."""
    null = _draws(stored_differences, 1000, 5)
    assert 0.925 <= covered(null).mean() <= 0.975
    words = [verdict([weigh(LOWER, row.tolist(), [0.0] * 5)]) for row in null[:400]]
    assert words.count("holds") <= 0.05 * 400
    assert words.count("does not hold") <= 0.05 * 400


def test_power_on_stored_scores(stored_differences):
    """An effect of 1.5 standard deviations planted into stored pairs is found at the power of theory."""
    scale = stored_differences.std()
    found = 1 - covered(_draws(stored_differences, 1000, 5) + 1.5 * scale).mean()
    assert found == pytest.approx(power(1.5, 5), abs=0.05)
