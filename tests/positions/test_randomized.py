"""Positions drawn at random: shapes, padding, generators and bad input; their law is in test_randomized_law.py."""

import pytest
import torch

from danlu.positions import even_positions, random_positions


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", ["lengths", "list", "left", "right"])
def test_sorted_different_and_in_range(shape):
    counts = torch.tensor([1, 7, 20, 0, 12])
    slots = torch.arange(20)
    lengths = {
        "lengths": counts,
        "list": counts.tolist(),
        "left": slots >= 20 - counts[:, None],
        "right": (slots < counts[:, None]).long(),
    }[shape]
    found = random_positions(lengths, 25, generator=seeded())
    assert found.shape == (5, 20)
    assert found.dtype == torch.int64
    for row, n in zip(found, counts.tolist(), strict=True):
        tokens = row[20 - n :] if shape == "left" else row[:n]
        assert (tokens[1:] > tokens[:-1]).all()
        assert ((tokens >= 0) & (tokens < 25)).all()
        padding = row[: 20 - n] if shape == "left" else row[n:]
        assert not padding.any()


def test_as_many_tokens_as_positions():
    assert torch.equal(random_positions([9, 9], 9)[1], torch.arange(9))


def test_one_token_and_none():
    for mode in ("sorted", "equal_mean"):
        assert random_positions([], 5, mode=mode).shape == (0, 0)
        assert random_positions([0, 0], 5, mode=mode).shape == (2, 0)
    assert random_positions([1], 5, mode="equal_mean").tolist() == [[0.0]]


def test_generators():
    first, again, other = (random_positions([9, 4], 50, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Two samples of one call differ, too.
    both = random_positions([9, 9], 500, generator=seeded())
    assert not torch.equal(both[0], both[1])
    state = torch.get_rng_state()
    random_positions([9, 4], 50, mode="equal_mean", distribution="beta", generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_even_positions():
    found = even_positions(7, 40)
    assert found[0] == 0
    torch.testing.assert_close(found.diff(), torch.full((6,), 40 / 7, dtype=torch.float64))
    assert even_positions(40, 40).tolist() == list(range(40))
    assert len(even_positions(7, 7).long().unique()) == 7
    assert even_positions(0, 3).shape == (0,)


@pytest.mark.parametrize(
    ("lengths", "most", "options", "error", "match"),
    [
        ([3, 11], 10, {}, ValueError, "lengths must be at most max_position=10, got 11"),
        ([-1], 10, {}, ValueError, r"lengths\[0\] must be at least 0"),
        (torch.tensor([-1]), 10, {}, ValueError, "lengths must not be negative"),
        ([1.5], 10, {}, TypeError, r"lengths\[0\] must be an int"),
        (torch.ones(2), 10, {}, TypeError, "lengths must be integers or a mask"),
        (torch.ones(1, 2, 3).long(), 10, {}, ValueError, "lengths must have shape"),
        (torch.tensor([True]), 10, {}, ValueError, "lengths must have shape"),
        (torch.tensor([[1, 0, 1]]), 10, {}, ValueError, "without holes"),
        (torch.tensor([[0, 1, 0, 1]]), 10, {}, ValueError, "without holes"),
        ([1], 0, {}, ValueError, "max_position must be at least 1"),
        ([1], 10, {"mode": "random"}, ValueError, "mode must be one of"),
        ([1], 10, {"distribution": "normal"}, ValueError, "distribution must be one of"),
        ([1], 10, {"concentration": 0.0}, ValueError, "concentration must be"),
    ],
)
def test_bad_input(lengths, most, options, error, match):
    with pytest.raises(error, match=match):
        random_positions(lengths, most, **options)


def test_bad_even_positions():
    with pytest.raises(ValueError, match="length must be at most max_position=3, got 4"):
        even_positions(4, 3)
    with pytest.raises(ValueError, match="length must be at least 0"):
        even_positions(-1, 3)
