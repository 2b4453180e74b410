"""The law of random position ids: subsets and their order statistics, and the means of the real ones, exactly."""

import itertools

import pytest
import torch

from danlu.positions import even_positions, random_positions

# Below 16 positions per slot every position gets a key; from there on numbers are drawn and repetitions mended.
LIMITS = pytest.mark.parametrize("limit", [13, 40, 500], ids=["full", "dense", "sparse"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def full(rows: int, length: int) -> torch.Tensor:
    return torch.ones(rows, length, dtype=torch.int64)


@LIMITS
def test_sorted_unique_in_range(limit):
    found = random_positions(full(300, 13), max_position=limit, generator=seeded())
    assert found.dtype == torch.int64
    assert found.shape == (300, 13)
    assert (found.diff() > 0).all()
    assert found.min() >= 0
    assert found.max() < limit
    if limit == 13:
        assert torch.equal(found[0], torch.arange(13))
    else:
        assert found.min() == 0
        assert found.max() == limit - 1
        assert len(found.unique(dim=0)) == 300


@LIMITS
def test_means_are_those_of_order_statistics(limit):
    n, draws = 13, 10_000
    found = random_positions(full(draws, n), max_position=limit, generator=seeded(1)).double()
    i = torch.arange(n, dtype=torch.float64)
    expected = (i + 1) * (limit + 1) / (n + 1) - 1
    # Of the i-th of n draws without replacement from 1..L.
    variance = (i + 1) * (n - i) * (limit + 1) * (limit - n) / ((n + 1) ** 2 * (n + 2))
    assert ((found.mean(0) - expected).abs() <= 3 * (variance / draws).sqrt() + 1e-12).all()
    torch.testing.assert_close(found.var(0), variance, rtol=0.06, atol=1e-12)


@pytest.mark.parametrize(("n", "limit"), [(2, 5), (3, 6), (1, 4)])
def test_all_subsets_are_equally_likely(n, limit):
    draws = 30_000
    found = random_positions(full(draws, n), max_position=limit, generator=seeded(2))
    values, counts = found.unique(dim=0, return_counts=True)
    assert [tuple(row) for row in values.tolist()] == list(itertools.combinations(range(limit), n))
    expected = draws / len(counts)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # The 0.999 quantiles of chi square with 9, 19 and 3 degrees of freedom are 27.9, 43.8 and 16.3.
    assert statistic < {10: 27.9, 20: 43.8, 4: 16.3}[len(counts)]


def test_sparse_draws_are_uniform_subsets():
    # Two of 32: 16 positions per slot.
    draws = 60_000
    found = random_positions(full(draws, 2), max_position=32, generator=seeded(3))
    code = found[:, 0] * 32 + found[:, 1]
    counts = code.bincount(minlength=1024)
    counts = counts[counts > 0]
    assert len(counts) == 32 * 31 // 2
    statistic = float(((counts - draws / 496) ** 2 / (draws / 496)).sum())
    # Chi square with 495 degrees of freedom: mean 495, sd 31.5; four of them.
    assert abs(statistic - 495) < 126


@LIMITS
def test_padding_on_either_side_and_lengths(limit):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]])
    found = random_positions(mask, max_position=limit, generator=seeded())
    assert (found[mask == 0] == 0).all()
    for row, kept in zip(found, mask, strict=True):
        inside = row[kept == 1]
        assert (inside.diff() > 0).all()
        assert (inside < limit).all()
    assert torch.equal(found, random_positions(mask.bool(), max_position=limit, generator=seeded()))
    by_length = random_positions(torch.tensor([3, 1, 4]), max_position=limit, generator=seeded())
    assert by_length.shape == (3, 4)
    assert (by_length[0, 3:] == 0).all()
    assert (by_length[1, 1:] == 0).all()


def test_short_samples_beside_long_ones_have_the_same_law():
    # The members of a sample do not depend on the length of the batch.
    mask = full(20_000, 6)
    mask[:, 2:] = 0
    found = random_positions(mask, max_position=9, generator=seeded(4))[:, :2].double()
    expected = torch.tensor([1, 2]) * 10 / 3 - 1
    sd = (torch.tensor([2.0, 2.0]) * 10 * 7 / (9 * 4) / 20_000).sqrt()
    assert ((found.mean(0) - expected).abs() < 3 * sd).all()


@pytest.mark.parametrize("n", [2, 5, 40])
def test_equal_mean_without_its_end_has_plain_means_exactly(n):
    draws = 10_000
    found = random_positions(full(draws, n), mode="equal_mean", generator=seeded(n)).double()
    assert (found[:, 0] == 0).all()
    i = torch.arange(n, dtype=torch.float64)
    # The standard deviation of p_i is i.
    assert ((found.mean(0) - i).abs() <= 3 * i / draws**0.5).all()
    # One number per sample: rows are multiples of plain positions, to the rounding of float32.
    torch.testing.assert_close(found, found[:, 1:2] * i, rtol=1e-6, atol=0)
    # Exactly i once the random number is divided by its own mean in the sample.
    ratio = found / found[:, 1:2].mean()
    torch.testing.assert_close(ratio.mean(0), i, rtol=1e-6, atol=1e-6)


def test_the_articles_linspace_is_off_by_n_over_n_minus_1():
    n, draws = 5, 10_000
    inner = random_positions(full(draws, n), mode="equal_mean", generator=seeded())
    outer = random_positions(full(draws, n), mode="equal_mean", endpoint=True, generator=seeded())
    torch.testing.assert_close(outer, inner * n / (n - 1))
    i = torch.arange(n, dtype=torch.float64)
    sd = i * n / (n - 1) / draws**0.5
    means = outer.double().mean(0)
    assert ((means - n * i / (n - 1)).abs() <= 3 * sd).all()
    assert ((means - i).abs()[1:] > 3 * sd[1:]).all()


def test_variance_of_the_exponential_is_n_squared():
    n, draws = 6, 200_000
    total = random_positions(full(draws, n), mode="equal_mean", generator=seeded(5)).double()[:, 1] * n
    # The standard deviation of a sample variance is sqrt(8 / draws) n^2, as the fourth moment is 9 n^4.
    assert abs(total.var() / n**2 - 1) < 3 * (8 / draws) ** 0.5
    assert abs(total.mean() / n - 1) < 3 * (1 / draws) ** 0.5


@pytest.mark.parametrize("concentration", [0.5, 2.0, 30.0])
def test_beta_has_its_mean_bound_and_variance(concentration):
    n, limit, draws = 6, 30, 50_000
    options = {"mode": "equal_mean", "distribution": "beta", "max_position": limit, "concentration": concentration}
    total = random_positions(full(draws, n), **options, generator=seeded(6)).double()[:, 1] * n
    variance = n * (limit - n) / (concentration + 1)
    assert total.max() <= limit * (1 + 1e-6)
    assert abs(total.mean() - n) < 3 * (variance / draws) ** 0.5
    assert abs(total.var() / variance - 1) < 0.03


def test_one_token_is_at_0():
    mask = torch.tensor([[0, 1, 0], [0, 0, 0]])
    for options in ({}, {"endpoint": True}, {"distribution": "beta", "max_position": 9}):
        assert (random_positions(mask, mode="equal_mean", **options) == 0).all()
    assert random_positions(torch.tensor([1]), max_position=1).tolist() == [[0]]


@pytest.mark.parametrize(
    "options",
    [{"max_position": 20}, {"max_position": 900}, {"mode": "equal_mean"}],
    ids=["dense", "sparse", "equal_mean"],
)
def test_a_generator_reproduces_and_the_global_one_moves(options):
    first = random_positions(full(4, 6), **options, generator=seeded(1))
    assert torch.equal(first, random_positions(full(4, 6), **options, generator=seeded(1)))
    assert not torch.equal(first, random_positions(full(4, 6), **options, generator=seeded(2)))
    source = seeded(1)
    assert torch.equal(first, random_positions(full(4, 6), **options, generator=source))
    assert not torch.equal(first, random_positions(full(4, 6), **options, generator=source))
    torch.manual_seed(0)
    a, b = random_positions(full(4, 6), **options), random_positions(full(4, 6), **options)
    assert not torch.equal(a, b)
    torch.manual_seed(0)
    assert torch.equal(a, random_positions(full(4, 6), **options))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_gives_nothing(shape):
    for options in ({"max_position": 5}, {"max_position": 900}, {"mode": "equal_mean"}):
        assert random_positions(full(*shape), **options).shape == shape
    assert even_positions(full(*shape), 5).shape == shape
    assert random_positions(torch.zeros(0, dtype=torch.int64), max_position=5).shape == (0, 0)


def test_samples_of_a_batch_differ():
    for options in ({"max_position": 50}, {"max_position": 900}, {"mode": "equal_mean"}):
        assert len(random_positions(full(8, 5), **options, generator=seeded()).unique(dim=0)) == 8


def test_positions_are_never_half():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert random_positions(full(2, 3), mode="equal_mean").dtype == torch.float32
        assert random_positions(full(2, 3), max_position=2**40).dtype == torch.int64


def test_even_positions_of_batches():
    found = even_positions(torch.tensor([4, 3, 1]), 10)
    assert found.dtype == torch.float64
    assert found.tolist() == [[0, 2.5, 5, 7.5], [0, 10 / 3, 20 / 3, 0], [0] * 4]
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    assert even_positions(mask, 10).tolist() == [[0, 0, 0, 5], [0, 0, 0, 0]]
    for n in (1, 2, 7, 99, 100):
        row = even_positions(torch.tensor([n]), 100)[0]
        assert torch.equal(row, even_positions(n, 100))
        # As integers they are different, and exactly the quotients rounded down.
        assert row.long().tolist() == [i * 100 // n for i in range(n)]


def test_what_is_missing_or_does_not_fit():
    beta = {"mode": "equal_mean", "distribution": "beta"}
    with pytest.raises(ValueError, match="lengths must be below max_position=5 with distribution='beta'"):
        random_positions(full(2, 5), 5, **beta)
    for options in ({}, beta):
        with pytest.raises(ValueError, match="max_position is missing"):
            random_positions(full(2, 5), **options)
    with pytest.raises(ValueError, match="concentration must be in"):
        random_positions(full(2, 5), 9, **beta, concentration=0.01)
    with pytest.raises(TypeError, match="max_position must be an int"):
        random_positions(full(2, 5), 9.0)
    with pytest.raises(ValueError, match="lengths must be at most max_position=4, got 5"):
        even_positions(full(1, 5), 4)
    # Slots may be more than positions as long as the tokens are not.
    assert random_positions(torch.tensor([[0, 0, 1, 1]]), 2).tolist() == [[0, 0, 0, 1]]
