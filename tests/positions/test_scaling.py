"""Frequencies for longer text: golden numbers and bad input; their identities are in test_scaling_rules.py."""

import pytest
import torch

from danlu.positions import RotaryEmbedding, rope_frequencies

METHODS = ("linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed")
GOLDEN = {
    "linear": [0.125, 0.0125, 0.00125, 0.000125],
    "ntk-old": [1, 0.0594604, 0.00353553, 0.000210224],
    "ntk-aware": [1, 0.05, 0.0025, 0.000125],
    "ntk-fixed": [0.594604, 0.0353553, 0.00210224, 0.000125],
    "ntk-mixed": [0.417155, 0.0259668, 0.00176005, 0.000125],
}


@pytest.mark.parametrize("method", METHODS)
def test_golden_values(method):
    found = rope_frequencies(8, method=method, factor=8)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(GOLDEN[method], dtype=torch.float64), rtol=3e-6, atol=0)


def test_golden_value_of_the_authors_power():
    expected = torch.tensor([0.479413, 0.0290415, 0.00187144, 0.000125], dtype=torch.float64)
    found = rope_frequencies(8, method="ntk-mixed", factor=8, mixed_power=0.75)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=0)


def test_module():
    module = RotaryEmbedding(8, method="ntk-mixed", factor=4.0, mixed_power=0.75)
    assert torch.equal(module.inv_freq, rope_frequencies(8, method="ntk-mixed", factor=4.0, mixed_power=0.75))
    assert repr(module) == "RotaryEmbedding(dim=8, base=10000.0, method='ntk-mixed', factor=4.0, interleaved=False)"


@pytest.mark.parametrize(
    ("dim", "options", "error", "match"),
    [
        (8, {"method": "yarn"}, ValueError, "method must be one of"),
        (8, {"factor": 2.0}, ValueError, "factor must be 1 with method='default', got 2.0"),
        (8, {"method": "linear", "factor": 0.0}, ValueError, "factor must be"),
        (8, {"method": "linear", "factor": "2"}, TypeError, "factor must be"),
        (8, {"method": "ntk-mixed", "factor": 2.0, "mixed_power": -1.0}, ValueError, "mixed_power must be"),
        (2, {"method": "ntk-aware", "factor": 2.0}, ValueError, "needs a dim of at least 4"),
    ],
)
def test_bad_input(dim, options, error, match):
    with pytest.raises(error, match=match):
        rope_frequencies(dim, **options)
