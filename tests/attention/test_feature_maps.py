"""Feature maps alone: values, the estimate of FAVOR+ and its directions, soft assignment, padding, bad input."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from danlu.attention import FavorFeatures, SoftVQFeatures, feature_map, linear_attention
from danlu.attention._feature_maps import elu1, random_projection

SEED = 5


def seeded(seed=SEED):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=SEED, sd=1.0):
    return sd * torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def favor(dim, features, **options):
    return FavorFeatures(dim, features, generator=seeded(), **options).double()


# ----------------------------------------------------------------------------------------------------- by channel


def test_values_by_hand():
    x = torch.tensor([-30.0, -1.0, 0.0, 2.0])
    torch.testing.assert_close(elu1(x), torch.tensor([9.3576e-14, 0.36788, 1.0, 3.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(elu1(x[1:]), F.elu(x[1:]) + 1)
    # What elu(x) + 1 rounds to 0.
    assert F.elu(x[0]) + 1 == 0
    query = x.view(1, 1, 2, 2)
    assert torch.equal(feature_map("relu")(query, query)[1], query.clamp(min=0))
    assert torch.equal(feature_map(torch.square)(query, query)[0], query.square())
    ends = torch.tensor([0.0, math.inf, -math.inf, math.nan], requires_grad=True)
    torch.testing.assert_close(elu1(ends), torch.tensor([1.0, math.inf, 0.0, math.nan]), equal_nan=True)
    assert torch.autograd.grad(elu1(ends).sum(), ends)[0][:3].tolist() == [1, 1, 0]
    apart = x[[0, 1, 3]].double().requires_grad_()
    assert torch.autograd.gradcheck(elu1, apart, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(elu1, apart)
    compiled = torch.compile(elu1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), elu1(x))


def test_elu1_keeps_its_values_alone():
    held = []

    def keep(x):
        held.append(x.data_ptr())
        return x

    x = normal(8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = elu1(x)
    assert set(held) == {out.data_ptr()}


def test_exp_is_divided_by_its_largest():
    query, key = normal(2, 4, 9, 6), normal(2, 2, 9, 6, seed=1)
    features = feature_map("exp")
    q, (k, log_scale) = features.query_features(query), features.key_features(key)
    assert (q.amax(-1) == 1).all()
    assert (k.amax((-2, -1)) == 1).all()
    torch.testing.assert_close(k * log_scale.exp(), key.exp(), rtol=1e-14, atol=0)
    value = normal(2, 2, 9, 5, seed=2)
    exact = linear_attention(query.exp(), key.exp(), value)
    torch.testing.assert_close(linear_attention(q, k, value), exact, rtol=0, atol=1e-14)
    # Where the plain exponentials overflow.
    far = linear_attention(*features(query + 2000, key + 2000), value)
    torch.testing.assert_close(far, exact, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- FAVOR+


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_estimate_is_unbiased(orthogonal):
    """Mean of 4000 draws within three standard errors, for queries and keys of length 1."""
    dim, draws = 16, 4000
    query, key = (F.normalize(normal(6, dim, seed=seed), dim=-1) for seed in (1, 2))
    # One projection of 4000 blocks; each is a draw of its own.
    features = favor(dim, dim * draws, orthogonal=orthogonal, stabilize=False)
    q, (k, _) = features.query_features(query[None, None]), features.key_features(key[None, None])
    products = (q * k)[0, 0].view(6, draws, dim).sum(-1) * draws
    error = products.mean(-1) - (query * key).sum(-1).div(dim**0.5).exp()
    assert (error.abs() <= 3 * products.std(-1) / draws**0.5).all()


DIRECTIONS = {
    "ones": torch.ones(16),
    "alternating": torch.tensor([1.0, -1.0] * 8),
    "first": torch.eye(16)[0],
    "last": torch.eye(16)[15],
    "random": torch.randn(16, generator=torch.Generator().manual_seed(7)),
}


@pytest.fixture(scope="module")
def projections():
    """Rows of 30000 draws: ours, and the factor of the QR decomposition as it comes, by columns and by rows."""
    dim, draws = 16, 30000
    generator = seeded()
    factor, _ = torch.linalg.qr(torch.randn(draws, dim, dim, generator=generator, dtype=torch.float64))
    lengths = torch.randn(draws * dim, dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    ours = random_projection(dim, dim * draws, orthogonal=True, generator=seeded())
    return ours, [rows.flatten(0, 1) * lengths for rows in (factor.mT, factor)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_signs_of_the_orthogonal_factor_matter(direction, projections):
    """At q = k of length 1.5 the truth is e^{2.25 / 4} = 1.755; without the signs of R the estimate is biased."""
    x = 1.5 * F.normalize(DIRECTIONS[direction].double(), dim=0) * 16**-0.25
    truth = math.exp(2.25 / 4)

    def estimate(rows):
        terms = (2 * rows @ x - x.square().sum()).exp().view(-1, 16).mean(-1)
        return float(terms.mean()), float(terms.std() / len(terms) ** 0.5)

    ours, uncorrected = projections
    mean, error = estimate(ours)
    assert abs(mean - truth) < 3 * error
    for rows in uncorrected:
        wrong, error = estimate(rows)
        assert abs(wrong - truth) > 5 * error
        if direction == "ones":
            assert wrong == pytest.approx(1.378, abs=0.02)


def test_rows_of_a_block_are_orthogonal_with_lengths_of_normal_vectors():
    rows = random_projection(8, 8 * 2000 + 3, orthogonal=True, generator=seeded())
    assert rows.shape == (16003, 8)
    products = rows[:16000].view(2000, 8, 8) @ rows[:16000].view(2000, 8, 8).mT
    off = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-12
    squares = products.diagonal(dim1=-2, dim2=-1).flatten()
    # A sum of 8 squares: mean 8, variance 16.
    assert float(squares.mean()) == pytest.approx(8, abs=0.1)
    assert float(squares.var()) == pytest.approx(16, abs=0.8)


# Standard deviation of queries and keys, then features: relative error of the output with orthogonal rows, and with
# independent ones.
ERRORS = {
    0.5: {16: (0.325, 0.373), 64: (0.195, 0.220), 256: (0.113, 0.128), 1024: (0.061, 0.070)},
    1.0: {16: (1.03, None), 64: (0.96, None), 256: (0.78, None), 1024: (0.63, None)},
}


def relative_error(sd, features, orthogonal=True, draws=20):
    total = 0.0
    generator = seeded(1)
    for _ in range(draws):
        query, key = (sd * torch.randn(1, 1, 128, 16, generator=generator, dtype=torch.float64) for _ in range(2))
        value = torch.randn(1, 1, 128, 16, generator=generator, dtype=torch.float64)
        exact = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        chosen = FavorFeatures(16, features, orthogonal=orthogonal, generator=generator).double()
        out = linear_attention(*chosen(query, key), value)
        total += float((out - exact).norm() / exact.norm())
    return total / draws


@pytest.mark.parametrize(("sd", "features"), [(sd, m) for sd in ERRORS for m in ERRORS[sd]])
def test_error_of_the_output(sd, features):
    """16 channels, 128 keys, causal, mean of 20 draws; single draws differ by a third of the mean."""
    for orthogonal, wanted in zip((True, False), ERRORS[sd][features], strict=True):
        if wanted is not None:
            found = relative_error(sd, features, orthogonal)
            assert found == pytest.approx(wanted, rel=0.3 if sd < 1 else 0.15)


@pytest.mark.parametrize("features", [16, 64, 256, 1024])
def test_peaked_attention_is_not_approximated(features):
    """At standard deviation 2 the output is farther off than 0 is, which has an error of 1, with any kind of rows."""
    assert relative_error(2.0, features) >= 1.07
    assert relative_error(2.0, features, orthogonal=False) >= 1.05


def test_relation_to_soft_assignment():
    """The products are e^{w.q} e^{-|k - w|^2/2} e^{|w|^2/2}, up to factors of a query and of all keys."""
    features = favor(6, 10, scale=1.0, stabilize=False)
    query, key = normal(1, 1, 4, 6), normal(1, 1, 5, 6, seed=1)
    q, k = features(query, key)
    products = q[0, 0, :, None] * k[0, 0, None]
    omega = features.projection
    assigned = (-(key[0, 0][:, None] - omega).square().sum(-1) / 2 + omega.square().sum(-1) / 2).exp()
    claimed = (query[0, 0] @ omega.T).exp()[:, None] * assigned
    ratio = products / claimed
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-12, atol=0)


def test_rows_of_one_length_are_a_codebook():
    """FAVOR+ is then soft quantization of width 1 to its rows, but for weights of keys: their sums are not 1."""
    features = favor(6, 10, scale=1.0)
    features.projection = 2.0 * F.normalize(features.projection, dim=-1)
    query, key, value = normal(1, 1, 9, 6), normal(1, 1, 9, 6, seed=1), normal(1, 1, 9, 3, seed=2)
    out = linear_attention(*features(query, key), value)
    q, k = SoftVQFeatures(features.projection, sigma=1.0, scale=1.0)(query, key)
    nearness = (-(key[..., None, :] - features.projection).square().sum(-1) / 2).exp().sum(-1, keepdim=True)
    torch.testing.assert_close(linear_attention(q, k * nearness, value), out, rtol=0, atol=1e-13)
    # With weights that sum to 1 it is another attention.
    assert (linear_attention(q, k, value) - out).abs().max() > 0.01


def test_stabilized_features_give_the_same_output_and_do_not_overflow():
    query, key, value = normal(1, 2, 30, 8), normal(1, 2, 30, 8, seed=1), normal(1, 2, 30, 4, seed=2)
    plain, stable = favor(8, 24, stabilize=False), favor(8, 24)
    torch.testing.assert_close(
        linear_attention(*stable(query, key), value), linear_attention(*plain(query, key), value), rtol=0, atol=1e-13
    )
    long = 200 * F.normalize(key, dim=-1)
    assert (plain(long, long)[1] == 0).all()
    assert linear_attention(*stable(long, long), value)[:, :, -1].abs().max() > 1e-3
    assert all(x.isfinite().all() for x in stable(long, long))


def test_projection_is_kept_and_drawn_again_when_told():
    module = FavorFeatures(8, 20, generator=seeded())
    again = FavorFeatures(8, 20)
    assert list(module.state_dict()) == ["projection"]
    again.load_state_dict(module.state_dict())
    query = torch.randn(1, 1, 3, 8, generator=seeded())
    assert torch.equal(module(query, query)[0], again(query, query)[0])
    assert torch.equal(module(query, query)[0], module(query, query)[0])
    moving = FavorFeatures(8, 20, redraw=True, generator=seeded())
    x = query.clone().requires_grad_()
    first, second = moving(x, x)[0], moving(x, x)[0]
    assert not torch.equal(first, second)
    # The graph of the first call holds its own projection.
    (first.sum() + second.sum()).backward()
    assert x.grad.isfinite().all()
    moving.eval()
    assert torch.equal(moving(query, query)[0], moving(query, query)[0])
    assert "num_features=20, orthogonal=True, redraw=True" in repr(moving)
    torch.manual_seed(0)
    one = FavorFeatures(4, 4).projection
    torch.manual_seed(0)
    assert torch.equal(FavorFeatures(4, 4).projection, one)


# -------------------------------------------------------------------------------------------------- soft assignment


def quantized(query, key, value, codebook):
    """Softmax attention, not causal, over keys replaced by their nearest codes."""
    nearest = torch.cdist(key, codebook).argmin(-1)
    return torch.softmax(query @ codebook[nearest].mT * query.shape[-1] ** -0.5, -1) @ value


def quantization_errors(query, key, value, codebook, sigmas):
    """Largest deviation from attention over hard quantized keys, by width."""
    hard = quantized(query, key, value, codebook)
    errors = []
    for sigma in sigmas:
        features = feature_map("softvq", codebook=codebook, sigma=sigma)
        out = linear_attention(*features(query[None, None], key[None, None]), value[None, None], is_causal=False)
        errors.append(float((out[0, 0] - hard).abs().max()))
    return errors


# The table of the width; its order of magnitude is that of e^{-gap / 2 sigma^2}, with the smallest gap between the
# squared distances of a key to its nearest two codes, 0.073 for these inputs.
DEVIATIONS = {0.5: 0.26, 0.2: 0.046, 0.1: 3.7e-3, 0.05: 5e-8, 0.02: 6e-16}


def test_narrow_assignment_is_hard_quantization():
    query, key, value = normal(10, 8, seed=1684), normal(20, 8, seed=1685), normal(20, 4, seed=1686)
    codebook = normal(8, 8, seed=1687)
    nearest = (key[:, None] - codebook).square().sum(-1).topk(2, largest=False).values
    assert float((nearest[:, 1] - nearest[:, 0]).min()) == pytest.approx(0.073, abs=1e-3)
    errors = quantization_errors(query, key, value, codebook, DEVIATIONS)
    for error, wanted in zip(errors[:-1], list(DEVIATIONS.values())[:-1], strict=True):
        assert error == pytest.approx(wanted, rel=0.25)
    assert errors[-1] <= 2 * DEVIATIONS[0.02]


@pytest.mark.parametrize("seed", range(0, 40, 4))
def test_deviation_from_hard_quantization_is_bounded_by_what_the_nearest_code_leaves(seed):
    """By 2 max|v| (a / b - 1) times the mean share of the other codes; a and b: largest and least weight of a code."""
    query, key, value = normal(6, 4, seed=seed), normal(30, 4, seed=seed + 1), normal(30, 3, seed=seed + 2)
    codebook = normal(8, 4, seed=seed + 3)
    sigmas = (2.0, 0.5, 0.2, 0.1, 0.05)
    scores = query @ codebook.T * 4**-0.5
    spread = float((scores.amax(-1) - scores.amin(-1)).exp().max()) - 1
    bounds = []
    for sigma in sigmas:
        _, assigned = SoftVQFeatures(codebook, sigma=sigma)(query[None, None], key[None, None])
        bounds.append(2 * float(value.abs().max()) * spread * float(1 - assigned.amax(-1).mean()))
    errors = quantization_errors(query, key, value, codebook, sigmas)
    assert all(error <= bound + 1e-14 for error, bound in zip(errors, bounds, strict=True))


def test_codes_that_are_the_keys_give_softmax_attention():
    query, key, value = normal(1, 1, 12, 4), normal(1, 1, 12, 4, seed=1), normal(1, 1, 12, 3, seed=2)
    features = SoftVQFeatures(key[0, 0], sigma=1e-3)
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(linear_attention(*features(query, key), value), exact, rtol=0, atol=1e-14)


def test_codebooks_by_head_and_their_gradients():
    query, key = normal(2, 4, 7, 6), normal(2, 2, 7, 6, seed=1)
    codebook = nn.Parameter(normal(2, 5, 6, seed=2))
    features = SoftVQFeatures(codebook, sigma=0.8, scale=0.3)
    assert dict(features.named_parameters()) == {"codebook": codebook}
    q, k = features(query, key)
    assert q.shape == (2, 4, 7, 5)
    torch.testing.assert_close(k.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))
    for head in range(4):
        own = SoftVQFeatures(codebook.detach()[head // 2], sigma=0.8, scale=0.3)
        one = own(query[:, head : head + 1], key[:, head // 2 : head // 2 + 1])
        torch.testing.assert_close(one[0], q[:, head : head + 1].detach())
        torch.testing.assert_close(one[1], k[:, head // 2 : head // 2 + 1].detach())
        assert list(own.state_dict()) == ["codebook"]
    value = normal(2, 2, 7, 3, seed=3)

    def output(query, key, value, codes):
        return linear_attention(*SoftVQFeatures(codes, sigma=0.8)(query, key), value)

    inputs = [x[:, :, :4].clone().requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(output, (*inputs, normal(2, 5, 6, seed=2).requires_grad_()))
    distances = (key[:, :, :, None] - codebook.detach()[:, None]).square().sum(-1)
    torch.testing.assert_close(k.detach(), torch.softmax(-distances / (2 * 0.8**2), -1))


def test_a_codebook_is_learned_by_gradient():
    """From random codes to those that 200 keys gather around, for the output of softmax attention."""
    centers = 2 * normal(6, 8, seed=3)
    key = centers[torch.arange(200) % 6] + 0.1 * normal(200, 8, seed=1)
    query, value = normal(1, 1, 40, 8), normal(200, 4, seed=2) + centers[torch.arange(200) % 6, :4]
    inputs = (query, key[None, None], value[None, None])
    exact = F.scaled_dot_product_attention(*inputs)
    codebook = nn.Parameter(normal(6, 8, seed=4))
    features = SoftVQFeatures(codebook, sigma=1.0)
    optimizer = torch.optim.Adam([codebook], lr=0.1)
    losses = []
    for _ in range(150):
        out = linear_attention(*features(*inputs[:2]), inputs[2], is_causal=False)
        loss = (out - exact).square().mean() / exact.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.1
    assert losses[-1] < 0.01


# -------------------------------------------------------------------------------------------------------------- all


MAPS = {
    "elu1": lambda: feature_map("elu1"),
    "relu": lambda: feature_map("relu"),
    "exp": lambda: feature_map("exp"),
    "square": lambda: feature_map(torch.square),
    "favor": lambda: favor(6, 12),
    "favor_plain": lambda: favor(6, 12, stabilize=False),
    "softvq": lambda: feature_map("softvq", codebook=normal(9, 6), sigma=0.7),
}
maps = pytest.mark.parametrize("name", MAPS)


@maps
def test_features_are_nonnegative_in_the_dtype_of_the_input(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        features = MAPS[name]()
        query, key = normal(2, 4, 9, 6).to(dtype), normal(2, 2, 9, 6, seed=1).to(dtype)
        exact = features(query.double(), key.double())
        for one, other in zip(features(query, key), exact, strict=True):
            assert one.dtype == dtype
            assert (one >= 0).all()
            # Exponents up to 5, rounded, are off by half that many eps.
            assert (one - other).abs().max() <= 5 * torch.finfo(dtype).eps * max(1, float(other.max()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = MAPS[name]()(query.float(), key.float())
    assert all(x.dtype == torch.float32 for x in again)


@maps
def test_hidden_keys_change_nothing(name):
    """Neither their content, NaN included, nor their gradients; nor does a sample without visible keys."""
    features = MAPS[name]()
    query, key = normal(3, 4, 9, 6).requires_grad_(), normal(3, 2, 9, 6, seed=1).requires_grad_()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = mask[2] = False
    kept = ~mask[:, None, :, None].expand_as(key)
    value = normal(3, 2, 9, 4, seed=2)
    outs, grads = [], []
    for filler in (0.0, 1e4, float("nan")):
        filled = key.masked_fill(kept, filler)
        q, k = features(query, filled, mask)
        out = linear_attention(q, k, value, key_padding_mask=mask)
        outs.append(out.detach())
        grads.append(torch.autograd.grad(out.sum(), (query, key)))
        assert (out[2] == 0).all()
    assert all(torch.equal(one, outs[0]) for one in outs)
    assert all(grad.isfinite().all() for pair in grads for grad in pair)
    alone = linear_attention(*features(query[1:2, :, 4:], key[1:2, :, 4:]), value[1:2, :, 4:])
    torch.testing.assert_close(outs[0][1:2, :, 4:], alone.detach(), rtol=1e-12, atol=1e-12)


@maps
def test_transforms_and_second_derivatives(name):
    """The maps write in place what they made themselves; neither inputs nor derivatives notice."""
    features = MAPS[name]()
    query, key = normal(3, 1, 2, 4, 6), normal(3, 1, 2, 4, 6, seed=1)
    kept = query.clone(), key.clone()
    mask = torch.tensor([[True, False, True, True]])
    found = torch.func.vmap(features, in_dims=(0, 0, None))(query, key, mask)
    alone = [features(q, k, mask) for q, k in zip(query, key, strict=True)]
    for one, others in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others), rtol=1e-13, atol=1e-13)
    assert torch.equal(query, kept[0])
    assert torch.equal(key, kept[1])

    def output(query, key):
        # Features are divided by numbers without a gradient, which cancel here.
        return linear_attention(*features(query, key, mask), key, key_padding_mask=mask, backend="reference")

    inputs = [x[0, :, :1].clone().requires_grad_() for x in (query, key)]
    assert torch.autograd.gradcheck(output, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(output, inputs)


@maps
def test_empty_and_compiled(name):
    features = MAPS[name]()
    query, key = normal(2, 4, 9, 6), normal(2, 2, 9, 6, seed=1)
    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(query, key), features(query, key), strict=True):
        torch.testing.assert_close(one, other)
    assert features(query[:, :, :0], key[:, :, :0])[1].shape[:3] == (2, 2, 0)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: feature_map("softmax"), ValueError, "kind must be one of 'elu1', 'relu', 'exp', 'favor', 'softvq'"),
        (lambda: feature_map(3), TypeError, "kind must be a name or callable, got int"),
        (lambda: feature_map("favor", dim=4), ValueError, r"feature_map\('favor'\) needs num_features"),
        (lambda: feature_map("elu1", dim=4), ValueError, r"feature_map\('elu1'\) does not take dim"),
        (lambda: feature_map("softvq", sigma=1.0), ValueError, "needs codebook"),
        (lambda: FavorFeatures(0, 4), ValueError, "dim must be at least 1, got 0"),
        (lambda: FavorFeatures(4, 2.5), TypeError, "num_features must be an int, got float"),
        (lambda: FavorFeatures(4, 4, scale=0.0), ValueError, r"scale must be in \(0, inf\)"),
        (lambda: FavorFeatures(4, 4)(*torch.ones(2, 1, 1, 3, 5)), ValueError, "the head size must be dim = 4"),
        (lambda: SoftVQFeatures(torch.ones(3), sigma=1.0), ValueError, r"codebook must have shape \(S, D\)"),
        (lambda: SoftVQFeatures(torch.ones(3, 2).long(), sigma=1.0), TypeError, "codebook must be a floating-point"),
        (lambda: SoftVQFeatures(torch.ones(3, 2), sigma=0.0), ValueError, r"sigma must be in \(0, inf\)"),
        (
            lambda: SoftVQFeatures(torch.ones(2, 3, 4), sigma=1.0)(*torch.ones(2, 1, 3, 5, 4)),
            ValueError,
            r"a codebook \(2, 3, 4\) does not fit heads of shape \(1, 3, 5, 4\)",
        ),
        (lambda: feature_map("elu1")(*torch.ones(2, 1, 1, 3, 4).long()), TypeError, "must be a floating-point tensor"),
        (
            lambda: feature_map("elu1")(*torch.ones(2, 1, 1, 3, 4), torch.ones(1, 3)),
            TypeError,
            "key_padding_mask must be a bool tensor",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
