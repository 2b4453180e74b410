"""The frequency rules beside their formulas and the rules of transformers, by-parts, and frequencies of other kinds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.positions import RotaryEmbedding, apply_rope, rope_frequencies, scale_frequencies

RULES = ["linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed", "by-parts"]


def stretched(method, dim=8, base=10000.0, factor=8.0, **options):
    if method == "by-parts":
        options.setdefault("train_length", 128)
    return rope_frequencies(dim, base=base, method=method, factor=factor, **options)


@given(half=st.integers(2, 64), base=st.floats(100.0, 1e7), factor=st.floats(1.0, 100.0), power=st.floats(0.0, 1.0))
def test_the_last_frequency_is_interpolated(half, base, factor, power):
    plain = rope_frequencies(2 * half, base=base)
    for method, options in (
        ("linear", {}),
        ("ntk-aware", {}),
        ("ntk-fixed", {}),
        ("ntk-mixed", {"mixed_power": power}),
    ):
        last = stretched(method, 2 * half, base, factor, **options)[-1]
        torch.testing.assert_close(last, plain[-1] / factor, rtol=1e-12, atol=0)


@given(half=st.integers(2, 64), base=st.floats(100.0, 1e7), factor=st.floats(1.0, 100.0))
def test_rules_are_the_formulas_of_the_table(half, base, factor):
    dim = 2 * half
    m = torch.arange(1, half + 1, dtype=torch.float64)
    plain = base ** (-2 * (m - 1) / dim)
    a = math.log(factor) / half**0.625
    table = {
        "ntk-old": (base * factor) ** (-2 * (m - 1) / dim),
        "ntk-aware": (base * factor ** (dim / (dim - 2))) ** (-2 * (m - 1) / dim),
        "ntk-fixed": plain * factor ** (-2 * m / dim),
        "ntk-mixed": plain * torch.exp(-a * m**0.625),
    }
    for method, expected in table.items():
        torch.testing.assert_close(stretched(method, dim, base, factor), expected, rtol=1e-10, atol=0)


def test_limits_of_mixed_and_the_order_of_the_rules():
    torch.testing.assert_close(stretched("ntk-mixed", mixed_power=1.0), stretched("ntk-fixed"), rtol=1e-14, atol=0)
    torch.testing.assert_close(stretched("ntk-mixed", mixed_power=0.0), stretched("linear"), rtol=1e-14, atol=0)
    for method in RULES:
        torch.testing.assert_close(stretched(method, factor=1.0), rope_frequencies(8), rtol=1e-15, atol=0)
        found = stretched(method, 64)
        assert (found.diff() < 0).all()
        # Every rule slows down, and none by more than interpolation.
        assert (found <= rope_frequencies(64)).all()
        assert (found >= stretched("linear", 64) * (1 - 1e-12)).all()


def test_interpolation_is_positions_over_the_factor():
    x, positions = torch.randn(5, 8, dtype=torch.float64), torch.arange(5) * 700
    torch.testing.assert_close(
        apply_rope(x, positions, stretched("linear")),
        apply_rope(x, positions / 8.0, rope_frequencies(8)),
        atol=1e-9,
        rtol=0,
    )


def test_by_parts_keeps_what_turns_often_and_interpolates_what_does_not():
    plain, found = rope_frequencies(64), stretched("by-parts", 64, train_length=2048)
    often, seldom = 2048 * plain / (2 * math.pi) >= 32, 2048 * plain / (2 * math.pi) <= 1
    assert often.any()
    assert seldom.any()
    assert not (often | seldom).all()
    assert torch.equal(found[often], plain[often])
    torch.testing.assert_close(found[seldom], plain[seldom] / 8, rtol=1e-14, atol=0)
    between = ~(often | seldom)
    assert (found[between] < plain[between]).all()
    assert (found[between] > plain[between] / 8).all()


def test_against_the_rules_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def peer(kind, **parameters):
        config = transformers.LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": kind, "rope_theta": 5e4, "factor": 8.0, **parameters},
        )
        return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=2048)[0].double()

    def close(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)

    close(stretched("linear", 64, 5e4), peer("linear"))
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2048}
    close(stretched("by-parts", 64, 5e4, train_length=2048, turns=(1.0, 4.0)), peer("llama3", **llama3))
    # "dynamic" at text of L has the base of "ntk-aware" with the factor f L / T - (f - 1).
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 5e4, "factor": 4.0},
    )
    dynamic = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=2048)[0].double()
    close(stretched("ntk-aware", 64, 5e4, factor=4.0 * 2048 / 512 - 3.0), dynamic)


def test_stretching_twice_multiplies_and_works_on_any_frequencies():
    odd = torch.tensor([0.9, 0.31, 0.007])
    once = scale_frequencies(odd, method="ntk-mixed", factor=6.0)
    twice = scale_frequencies(scale_frequencies(odd, method="ntk-mixed", factor=2.0), method="ntk-mixed", factor=3.0)
    torch.testing.assert_close(once, twice, rtol=1e-13, atol=0)
    assert torch.equal(scale_frequencies(odd, method="default", factor=1.0), odd.double())
    assert scale_frequencies(odd.bfloat16(), method="linear", factor=2.0).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "linear", "factor": math.nan}, ValueError, "factor must be in"),
        ({"method": "linear", "train_length": 8}, ValueError, "train_length is an option of method='by-parts'"),
        ({"method": "by-parts", "factor": 2.0}, ValueError, "needs train_length"),
        ({"method": "by-parts", "train_length": 0}, ValueError, "train_length must be at least 1"),
        ({"method": "by-parts", "train_length": 8, "turns": (4.0, 4.0)}, ValueError, r"turns\[1\] must be in"),
        ({"method": "by-parts", "train_length": 8, "turns": (-1.0, 4.0)}, ValueError, r"turns\[0\] must be in"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        rope_frequencies(8, **options)


def test_module_by_parts():
    module = RotaryEmbedding(8, method="by-parts", factor=4.0, train_length=64)
    assert torch.equal(module.inv_freq, rope_frequencies(8, method="by-parts", factor=4.0, train_length=64))


def test_bad_frequencies():
    with pytest.raises(ValueError, match="needs a dim of at least 4"):
        rope_frequencies(2, method="ntk-aware", factor=2.0)
    with pytest.raises(TypeError, match="inv_freq must be a floating-point"):
        scale_frequencies(torch.arange(3), method="linear", factor=2.0)
    with pytest.raises(ValueError, match=r"inv_freq must have shape \(R / 2,\)"):
        scale_frequencies(torch.ones(2, 2), method="linear", factor=2.0)
