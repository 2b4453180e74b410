r"""Paired differences, their interval, and the verdict that follows.

The interval is the paired t interval: at 3 to 10 seeds a percentile or BCa bootstrap covers the truth in only
74-90 % of cases instead of 95 % (docs/decisions/0003-statistics.md has the simulation).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from danlu.lab.trial import Comparison

__all__ = ["CONFIDENCE", "Difference", "Part", "Verdict", "holm", "paired_difference", "power", "verdict", "weigh"]

CONFIDENCE = 0.95
# Below 6 pairs a two-sided sign-flip test cannot reach 0.05 (2 / 2^5 = 0.0625).
_SIGN_FLIP_PAIRS = 6

Verdict = Literal["holds", "holds in part", "not resolved at this scale", "does not hold"]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its interval.

    Args:
        count: number of pairs.
        mean: mean difference.
        low: lower end of the 95 % paired t interval.
        high: upper end.
        sign_flip: exact two-sided sign-flip p-value, from 6 pairs on; else None.
    """

    count: int
    mean: float
    low: float
    high: float
    sign_flip: float | None


@dataclass(frozen=True)
class Part:
    """One comparison of a claim with what the data say about it.

    `gain` is the paired difference signed so that positive favors the candidate. `p_better` is the one-sided
    p-value of "gain > -margin", `p_worse` of the opposite.
    """

    comparison: Comparison
    gain: Difference
    p_better: float
    p_worse: float


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of `first - second` over pairs, with the 95 % paired t interval and the exact sign-flip test.

    Raises:
        ValueError: the lengths differ, there are fewer than two pairs, or a value is not finite.
    """
    differences = _differences(first, second)
    count, mean = len(differences), float(differences.mean())
    if _constant(differences):
        return Difference(count, mean, mean, mean, _sign_flip(differences))
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    return Difference(count, mean, float(interval.low), float(interval.high), _sign_flip(differences))


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f"pairs are needed, got {len(first)} and {len(second)} scores")
    if len(first) < 2:
        raise ValueError(f"an interval needs at least two pairs, got {len(first)}")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("a score is not finite")
    return differences


def _constant(differences: np.ndarray) -> bool:
    """Whether the differences vary by no more than rounding, as those of a count of bytes do."""
    return float(np.ptp(differences)) <= 1e-12 * float(np.abs(differences).max(initial=0.0))


def _sign_flip(differences: np.ndarray) -> float | None:
    if len(differences) < _SIGN_FLIP_PAIRS:
        return None
    result = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=4096, rng=np.random.default_rng(0)
    )
    return float(result.pvalue)


def weigh(comparison: Comparison, candidate: Sequence[float], baseline: Sequence[float]) -> Part:
    """Compare the paired scores of two arms as `comparison` says."""
    first, second = (candidate, baseline) if comparison.better == "higher" else (baseline, candidate)
    if not np.isfinite([*first, *second]).all():
        # A diverged fit has no score. It counts against the arm that diverged; if both did, nothing is known.
        lost = bool(np.isfinite(baseline).all())
        return Part(comparison, Difference(len(first), math.nan, math.nan, math.nan, None), 1.0, 0.0 if lost else 1.0)
    gain = paired_difference(first, second)
    shifted = _differences(first, second) + comparison.margin
    if _constant(shifted):
        p_better = 0.0 if gain.mean + comparison.margin > 0 else 1.0
        p_worse = 0.0 if gain.mean + comparison.margin < 0 else 1.0
    else:
        p_better = float(stats.ttest_1samp(shifted, 0.0, alternative="greater").pvalue)
        p_worse = 1.0 - p_better
    return Part(comparison, gain, p_better, p_worse)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: reject where the adjusted value is below the family-wise level.

    S. Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = running
    return adjusted


def verdict(parts: Sequence[Part]) -> Verdict:
    r"""The word that follows from the parts of a claim.

    *holds*: every part is shown. All parts must be shown, so each is tested at the full level (an
    intersection-union test needs no correction). *holds in part*: some part is shown, and stays so after Holm's
    correction over the parts. *does not hold*: no part is shown and some part is contradicted, after the same
    correction. *not resolved at this scale*: anything else. One-sided tests at 2.5 %, which agree with the 95 %
    intervals.
    """
    level = (1 - CONFIDENCE) / 2
    if all(part.p_better < level for part in parts):
        return "holds"
    shown = holm({str(i): part.p_better for i, part in enumerate(parts)})
    if any(p < level for p in shown.values()):
        return "holds in part"
    contradicted = holm({str(i): part.p_worse for i, part in enumerate(parts)})
    if any(p < level for p in contradicted.values()):
        return "does not hold"
    return "not resolved at this scale"


def power(effect: float, count: int) -> float:
    """Probability that the 95 % paired t interval of `count` normal differences excludes zero.

    `effect` is the mean difference in units of the standard deviation of the differences (noncentral t).
    """
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    shift = effect * math.sqrt(count)
    return float(stats.nct.sf(critical, count - 1, shift) + stats.nct.cdf(-critical, count - 1, shift))
