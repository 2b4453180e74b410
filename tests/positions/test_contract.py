"""What the family promises: rotations keep norms, compose, depend on differences, and can be undone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import danlu.positions as family
from danlu.positions import RotaryEmbedding, apply_rope, logn_scale, random_positions, rope_frequencies

FREQUENCIES = rope_frequencies(8)


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# What the tests below run on; the other names make ids, scales or masks, and have promises of their own.
ROTATIONS = {"RotaryEmbedding", "apply_rope", "rope_frequencies", "scale_frequencies"}
OTHERS = {
    "RandomPositionCollator",
    "RandomizedPositions",
    "alibi_bias",
    "alibi_slopes",
    "dynamic_factor",
    "even_positions",
    "logn_scale",
    "random_positions",
    "randomize_positions",
}


def test_family_is_covered():
    assert set(family.__all__) == ROTATIONS | OTHERS
    assert not ROTATIONS & OTHERS


@given(position=st.floats(-1e5, 1e5), interleaved=st.booleans(), seed=st.integers(0, 999))
def test_norm_is_kept_and_negative_positions_undo(position, interleaved, seed):
    x = vectors(3, 8, seed=seed)
    at = torch.tensor([position], dtype=torch.float64)
    turned = apply_rope(x, at, FREQUENCIES, interleaved=interleaved)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(apply_rope(turned, -at, FREQUENCIES, interleaved=interleaved), x, rtol=1e-11, atol=1e-11)


@given(
    a=st.integers(-5000, 5000), b=st.integers(-5000, 5000), shift=st.integers(-5000, 5000), interleaved=st.booleans()
)
def test_products_depend_on_differences(a, b, shift, interleaved):
    query, key = vectors(1, 8), vectors(1, 8, seed=1)

    def score(i: int, j: int) -> Tensor:
        turned = [
            apply_rope(x, torch.tensor([p]), FREQUENCIES, interleaved=interleaved) for x, p in ((query, i), (key, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(a, b), score(a + shift, b + shift), rtol=1e-10, atol=1e-10)
    moved = apply_rope(key, torch.tensor([b - a]), FREQUENCIES, interleaved=interleaved)
    torch.testing.assert_close(score(a, b), (query * moved).sum(), rtol=1e-10, atol=1e-10)


def test_interleaved_is_halves_up_to_a_permutation():
    x, positions = vectors(2, 5, 8), torch.arange(5)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves = apply_rope(x[..., order], positions, FREQUENCIES)
    torch.testing.assert_close(apply_rope(x, positions, FREQUENCIES, interleaved=True)[..., order], halves)


def test_class_equals_function():
    module = RotaryEmbedding(8, base=500.0, interleaved=True)
    x = vectors(2, 3, 5, 8)
    frequencies = rope_frequencies(8, base=500.0)
    expected = apply_rope(x, torch.arange(5), frequencies, interleaved=True)
    assert torch.equal(module(x), expected)
    assert torch.equal(
        module(x, torch.arange(5) + 7), apply_rope(x, torch.arange(5) + 7, frequencies, interleaved=True)
    )
    assert "dim=8, base=500.0, interleaved=True" in repr(module)
    assert module.state_dict() == {}


@pytest.mark.parametrize("method", ["linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed", "by-parts"])
def test_stretched_frequencies_are_frequencies(method):
    options = {"train_length": 64} if method == "by-parts" else {}
    stretched = rope_frequencies(8, method=method, factor=4.0, **options)
    x, positions = vectors(3, 8), torch.tensor([0.0, 7.0, 500.0], dtype=torch.float64)
    turned = apply_rope(x, positions, stretched)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(apply_rope(turned, -positions, stretched), x, rtol=1e-11, atol=1e-11)


def test_ids_and_scales_compose_with_rotations():
    # Real positions and padding pass through apply_rope as they are, and a scale keeps the dtype of the queries.
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    queries = vectors(2, 3, 4, 8, dtype=torch.float32)
    for options in ({"max_position": 90}, {"mode": "equal_mean"}):
        positions = random_positions(mask, **options)[:, None]
        scale = logn_scale(mask.cumsum(-1), 4, "train")[:, None, :, None].to(queries.dtype)
        out = apply_rope(queries * scale, positions, FREQUENCIES)
        assert out.shape == queries.shape
        assert out.dtype == torch.float32
