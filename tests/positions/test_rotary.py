"""RoPE alone: golden numbers, the matrix of the paper, precision at large positions, and bad input."""

import math

import pytest
import torch

from danlu.positions import RotaryEmbedding, apply_rope, rope_frequencies


def test_golden_frequencies():
    torch.testing.assert_close(
        rope_frequencies(8), torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64), rtol=1e-14, atol=0
    )
    assert rope_frequencies(64, base=1e6)[-1].item() == pytest.approx(1e6 ** (-62 / 64), rel=1e-14)


@pytest.mark.parametrize("interleaved", [False, True])
def test_against_the_rotation_matrix(interleaved):
    inv_freq = rope_frequencies(6, base=50.0)
    x = torch.randn(4, 6, dtype=torch.float64)
    positions = torch.tensor([0.0, 1.5, -7.0, 1000.0], dtype=torch.float64)
    expected = x.clone()
    for row, p in enumerate(positions.tolist()):
        for m, theta in enumerate(inv_freq.tolist()):
            i, j = (2 * m, 2 * m + 1) if interleaved else (m, m + 3)
            c, s = math.cos(p * theta), math.sin(p * theta)
            expected[row, i] = x[row, i] * c - x[row, j] * s
            expected[row, j] = x[row, i] * s + x[row, j] * c
    out = apply_rope(x, positions, inv_freq, interleaved=interleaved)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_partial_rotation_leaves_the_rest():
    x = torch.randn(2, 3, 10)
    out = apply_rope(x, torch.arange(3), rope_frequencies(4))
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(out[..., :4], apply_rope(x[..., :4], torch.arange(3), rope_frequencies(4)))


@pytest.mark.parametrize("position", [4096, 100_000, 1_000_000])
def test_large_positions_are_exact_in_float32(position):
    x = torch.tensor([[1.0, 0.0]])
    out = apply_rope(x, torch.tensor([position]), rope_frequencies(2))
    assert out[0, 0].item() == pytest.approx(math.cos(position), abs=1e-6)
    assert out[0, 1].item() == pytest.approx(math.sin(position), abs=1e-6)


def test_float32_angles_would_be_wrong():
    # Why the table is float64: cosines of float32 angles at the positions of long text.
    exact = rope_frequencies(64)
    for position, error in ((4096, 2.4e-5), (100_000, 1.1e-3), (1_000_000, 1.6e-2)):
        cosines = (position * exact.float()).cos().double()
        assert (cosines - (position * exact).cos()).abs().max().item() == pytest.approx(error, rel=0.05)
        x = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), 1)
        turned = apply_rope(x, torch.tensor([position]), exact)[0, :32].double()
        torch.testing.assert_close(turned, (position * exact).cos(), rtol=0, atol=1e-7)
    assert torch.tensor(100_000).bfloat16().item() == 99_840


def test_neighbors_and_halves_are_one_map_up_to_a_permutation():
    x, positions, inv_freq = torch.randn(5, 10), torch.arange(5) * 100, rope_frequencies(8)
    # The first of every pair, the second of every pair, and what is not rotated.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7, 8, 9])
    halves = apply_rope(x[:, order], positions, inv_freq)
    assert torch.equal(apply_rope(x, positions, inv_freq, interleaved=True)[:, order], halves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_rotated_in_float32(dtype):
    x = torch.randn(2, 5, 8).to(dtype)
    positions, inv_freq = torch.arange(5) * 20_000, rope_frequencies(8)
    out = apply_rope(x, positions, inv_freq)
    assert out.dtype == dtype
    exact = apply_rope(x.double(), positions, inv_freq)
    assert torch.equal(out, exact.to(dtype)) or (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_rope(x, positions, inv_freq), out)
        single = apply_rope(x.float(), positions, inv_freq)
    assert torch.equal(single, apply_rope(x.float(), positions, inv_freq))


def test_frequencies_of_the_module_stay_float64():
    module = RotaryEmbedding(8).to(torch.bfloat16).half()
    assert module.inv_freq.dtype == torch.float64
    x = torch.randn(1, 2, 8)
    positions = torch.tensor([99_999, 100_000])
    assert torch.equal(module(x, positions), RotaryEmbedding(8)(x, positions))


def test_positions_per_sample_and_gradients():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.randint(0, 100, (2, 1, 4))
    out = apply_rope(x, positions, rope_frequencies(6))
    torch.testing.assert_close(out[1, 2], apply_rope(x[1, 2], positions[1, 0], rope_frequencies(6)))
    assert torch.autograd.gradcheck(lambda y: apply_rope(y, positions, rope_frequencies(6)), x)
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, positions, rope_frequencies(6)), out)
    assert apply_rope(x[:, :, :0], torch.arange(0), rope_frequencies(6)).shape == (2, 3, 0, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((7,), ValueError, "dim must be even, got 7"),
        ((0,), ValueError, "dim must be at least 2"),
        ((4.0,), TypeError, "dim must be an int"),
    ],
)
def test_bad_frequencies(arguments, error, match):
    with pytest.raises(error, match=match):
        rope_frequencies(*arguments)
    with pytest.raises(ValueError, match="base must be in"):
        rope_frequencies(4, base=0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.zeros(3, 4, dtype=torch.int64), torch.arange(3), rope_frequencies(4)), TypeError, "input must be"),
        ((torch.zeros(4), torch.arange(1), rope_frequencies(4)), ValueError, r"input must have shape \(\.\.\., L, D\)"),
        ((torch.zeros(3, 4), torch.arange(3), rope_frequencies(6)), ValueError, "R at most 4"),
        ((torch.zeros(3, 4), torch.arange(2), rope_frequencies(4)), ValueError, r"positions of shape \(2,\)"),
        ((torch.zeros(3, 4), torch.arange(3).bfloat16(), rope_frequencies(4)), TypeError, "positions must be integers"),
        ((torch.zeros(3, 4), [0, 1, 2], rope_frequencies(4)), TypeError, r"positions must be a torch\.Tensor"),
    ],
)
def test_bad_rotation(arguments, error, match):
    with pytest.raises(error, match=match):
        apply_rope(*arguments)
