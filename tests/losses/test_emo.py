"""EMO alone: the gradient, the population optimum, limits, the soft bound, the authors' package, corrections."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from danlu.losses import EMO, emo_bound, emo_loss, linear_emo_loss, tailr_loss
from danlu.losses._ground_cost import cosine_costs

# Every way to combine cross entropy and cost.
MODES = {
    "pure": {"mode": "pure"},
    "fixed": {"mode": "fixed", "ce_weight": 0.3, "emo_weight": 2.0},
    "ce_anchored": {},
    "ce_anchored_bounded": {"max_ratio": 3.0},
    "ce_anchored_shifted": {"shift_target": True},
    "emo_anchored": {"mode": "emo_anchored"},
    "emo_anchored_shifted": {"mode": "emo_anchored", "shift_target": True},
}
modes = pytest.mark.parametrize("mode", MODES)


def problem(rows: int = 9, classes: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    meaning = torch.randn(classes, 4, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(classes, (rows,), generator=generator), meaning


def parts(logits: Tensor, target: Tensor, meaning: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy, cost by the definition, and probability of the target, for every row."""
    unit = F.normalize(meaning, dim=1)
    p = logits.softmax(-1)
    cost = (p * (1 - unit[target] @ unit.T)).sum(-1)
    return F.cross_entropy(logits, target, reduction="none"), cost, p.gather(-1, target[:, None])[:, 0]


def combined(mode: str, nll: Tensor, cost: Tensor, p: Tensor) -> Tensor:
    """The formulas of the sources, with the weights as constants."""
    shifted = cost + p.detach()
    if mode == "pure":
        return cost
    if mode == "fixed":
        return 0.3 * nll + 2.0 * cost
    if mode.startswith("ce_anchored"):
        value = shifted if mode.endswith("shifted") else cost
        ratio = (nll / (value + 1e-10)).detach().clamp(max=3.0 if mode.endswith("bounded") else math.inf)
        return 0.5 * (nll + ratio * value)
    value = shifted if mode.endswith("shifted") else cost
    return (value / (nll + 1e-10)).detach() * nll + value


@modes
def test_formulas_of_the_sources(mode):
    logits, target, meaning = problem()
    value = emo_loss(logits, target, cost_embedding=meaning, reduction="none", **MODES[mode])
    expected = combined(mode, *parts(logits, target, meaning))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand(9, dtype=torch.float64)
    (mine,) = torch.autograd.grad(value, logits, weights)
    (theirs,) = torch.autograd.grad(expected, logits, weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_cost():
    """p_j (c_j - e), to 1e-12 of autograd."""
    logits, target, meaning = problem()
    value = emo_loss(logits, target, cost_embedding=meaning, mode="pure", reduction="none")
    (grad,) = torch.autograd.grad(value.sum(), logits)
    costs = cosine_costs(meaning, target, torch.float64)
    expected = logits.softmax(-1) * (costs - value[:, None])
    torch.testing.assert_close(grad, expected.detach(), rtol=0, atol=1e-12)
    exact = partial(emo_loss, target=target, cost_embedding=meaning, mode="pure")
    assert torch.autograd.gradcheck(exact, logits)
    assert torch.autograd.gradgradcheck(exact, logits)


def test_golden_values():
    """Three classes at 0, 60 and 90 degrees; probabilities (1/2, 1/4, 1/4); target 0."""
    meaning = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 3.0]], dtype=torch.float64)
    logits = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64).log()
    run = partial(emo_loss, logits, torch.tensor([0]), cost_embedding=meaning)
    assert run(mode="pure").item() == pytest.approx(0.25 * 0.5 + 0.25 * 1.0)
    assert run().item() == pytest.approx(math.log(2))
    assert run(max_ratio=1.0).item() == pytest.approx(0.5 * (math.log(2) + 0.375))
    assert run(mode="emo_anchored").item() == pytest.approx(0.75)
    assert run(shift_target=True, mode="emo_anchored").item() == pytest.approx(1.75)
    assert run(mode="fixed", ce_weight=2.0, emo_weight=4.0).item() == pytest.approx(2 * math.log(2) + 1.5)


def test_population_minimum_is_a_one_hot_medoid():
    """For true probabilities tau the minimum is one-hot at argmin_v sum_t tau_t c_tv, which need not be the mode."""
    costs = torch.tensor([[0.0, 0.4, 1.0], [0.4, 0.0, 0.4], [1.0, 0.4, 0.0]], dtype=torch.float64)
    truth = torch.tensor([0.4, 0.25, 0.35], dtype=torch.float64)
    medoid = int((truth @ costs).argmin())
    assert medoid == 1 != int(truth.argmax())
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(400):
        rows = emo_loss(logits.expand(3, 3), torch.arange(3), cost_matrix=costs, mode="pure", reduction="none")
        optimizer.zero_grad()
        (truth * rows).sum().backward()
        optimizer.step()
    assert logits.softmax(0)[medoid] > 0.999
    assert float((truth * rows.detach()).sum()) == pytest.approx(float((truth @ costs).min()), abs=1e-3)


def test_orthonormal_embedding_is_one_minus_the_probability():
    logits, target, _ = problem()
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    value = emo_loss(logits, target, cost_embedding=basis, mode="pure")
    expected = tailr_loss(logits, target, gamma=1.0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    same = emo_loss(logits, target, cost_matrix=1 - torch.eye(6, dtype=torch.float64), mode="pure")
    torch.testing.assert_close(same, expected, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 200), scale=st.floats(0.1, 100), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_between_zero_and_two(seed, scale, dtype):
    logits, target, meaning = problem(seed=seed)
    # Opposite and equal classes, at whose cosines rounding goes beyond 1.
    meaning = torch.cat((meaning[:2], -meaning[:2] * 3, meaning[:2] * 0.1)).to(dtype)
    value = emo_loss((scale * logits).to(dtype), target, cost_embedding=meaning, mode="pure", reduction="none")
    assert (value >= 0).all()
    # The probabilities themselves sum to 1 up to rounding.
    assert (value <= 2 + 8 * torch.finfo(dtype).eps).all()


def test_zero_exactly_where_all_mass_is_in_the_direction_of_the_target():
    meaning = torch.tensor([[1.0, 0], [3.0, 0], [0, 1.0]], dtype=torch.float64)
    inf = math.inf
    logits = torch.tensor([[0.0, 1.0, -inf], [0.0, 1.0, -40.0]], dtype=torch.float64)
    value = emo_loss(logits, torch.tensor([0, 0]), cost_embedding=meaning, mode="pure", reduction="none")
    assert value[0] == 0
    assert value[1] > 0


@pytest.mark.parametrize("width", [1, 4])
def test_equal_rows_cost_nothing(width):
    logits, target, _ = problem()
    value = emo_loss(logits, target, cost_embedding=torch.ones(6, width, dtype=torch.float64), mode="pure")
    (grad,) = torch.autograd.grad(value, logits)
    assert value.abs() <= 1e-15
    assert grad.abs().max() <= 1e-15


def test_ce_anchored_has_the_value_of_cross_entropy():
    logits, target, meaning = problem()
    value = emo_loss(logits, target, cost_embedding=meaning, reduction="none")
    torch.testing.assert_close(value, F.cross_entropy(logits, target, reduction="none"), rtol=1e-9, atol=0)


def test_zero_rows_have_no_direction():
    logits, target, meaning = problem()
    meaning[2] = 0
    costs = cosine_costs(meaning, torch.arange(6), torch.float64)
    others = torch.arange(6) != 2
    assert (costs[2, others] == 1).all()
    assert (costs[others, 2] == 1).all()
    assert (costs.diagonal() == 0).all()
    value = emo_loss(logits, target, cost_embedding=meaning, mode="pure", reduction="none")
    torch.testing.assert_close(value, (logits.softmax(-1) * costs[target]).sum(-1))


def test_label_smoothing():
    logits, target, meaning = problem()
    run = partial(emo_loss, logits, target, cost_embedding=meaning)
    torch.testing.assert_close(run(label_smoothing=0.2), 0.8 * run() - 0.2 * logits.log_softmax(-1).mean())


def test_no_gradient_reaches_the_embedding():
    logits, target, meaning = problem()
    meaning.requires_grad_()
    emo_loss(logits, target, cost_embedding=meaning).backward()
    assert meaning.grad is None
    hidden, head = torch.randn(9, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    linear_emo_loss(hidden, head, target, cost_embedding="head", mode="pure").backward()
    mine, head.grad = head.grad, None
    copy = head.detach().clone()
    emo_loss(F.linear(hidden, head), target, cost_embedding=copy, mode="pure").backward()
    torch.testing.assert_close(mine, head.grad)


def test_cost_matrix_has_targets_in_rows():
    costs = torch.tensor([[0.0, 5.0], [1.0, 0.0]], dtype=torch.float64)
    rows = emo_loss(
        torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0, 1]), cost_matrix=costs, mode="pure", reduction="none"
    )
    assert rows.tolist() == [2.5, 0.5]


# ----------------------------------------------------------------------------------------------------- corrections


@pytest.mark.parametrize("logit", [20.0, 40.0, 60.0])
def test_correction_confident_rows_keep_their_digits(logit):
    """One minus an inner product is rounding noise there; the sum of costs, with 0 at the target, is not."""
    classes = 1000
    meaning = torch.randn(classes, 16, generator=torch.Generator().manual_seed(3))
    logits = torch.zeros(1, classes)
    logits[0, 7] = logit
    target = torch.tensor([7])
    exact = emo_loss(logits.double(), target, cost_embedding=meaning.double(), mode="pure")
    mine = emo_loss(logits, target, cost_embedding=meaning, mode="pure")
    assert mine.item() == pytest.approx(exact.item(), rel=1e-4)
    fused = linear_emo_loss(logits, torch.eye(classes), target, cost_embedding=meaning, mode="pure")
    assert fused.item() == pytest.approx(exact.item(), rel=1e-4)
    unit = F.normalize(meaning, dim=1)
    uncorrected = 1 - ((logits.softmax(-1) @ unit) * unit[target]).sum(-1)
    assert abs(uncorrected.item() - exact.item()) > 1e-2 * exact.item()


def confident(logit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.zeros(1, 1000, dtype=dtype)
    logits[0, 7] = logit
    meaning = torch.randn(1000, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    return logits.requires_grad_(), torch.tensor([7]), meaning


def norm_of_gradient(loss: Tensor, logits: Tensor) -> float:
    return float(torch.autograd.grad(loss, logits)[0].abs().sum())


def test_correction_the_unbounded_weight_does_not_let_go_of_fitted_tokens():
    """The authors' formula at a target of probability 1 - 2e-6: a gradient of 2 where cross entropy has 4e-6."""
    logits, target, meaning = confident(20.0, torch.float64)
    plain = norm_of_gradient(F.cross_entropy(logits, target), logits)
    assert plain == pytest.approx(4.1e-6, rel=0.05)
    run = partial(emo_loss, logits, target, cost_embedding=meaning, mode="emo_anchored", shift_target=True)
    assert norm_of_gradient(run(min_nll=0.0), logits) == pytest.approx(2.0, rel=0.05)
    assert norm_of_gradient(run(), logits) <= 1.1e3 * plain < 5e-3
    # In float32 the likelihood of a fitted token rounds to exactly 1.
    logits, target, meaning = confident(25.0, torch.float32)
    run = partial(emo_loss, logits, target, cost_embedding=meaning, mode="emo_anchored", shift_target=True)
    assert norm_of_gradient(run(min_nll=0.0), logits) > 50
    assert norm_of_gradient(run(), logits) < 1e-3


@pytest.mark.parametrize("logit", [10.0, 20.0, 25.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "emo_anchored_shifted"])
@pytest.mark.parametrize("fused", [False, True])
def test_confident_rows_pull_no_more_than_ten_times_cross_entropy(mode, logit, dtype, fused):
    logits, target, meaning = confident(logit, dtype)
    options = {"cost_embedding": meaning, **MODES[mode]}
    if fused:
        loss = linear_emo_loss(logits, torch.eye(1000, dtype=dtype), target, **options)
    else:
        loss = emo_loss(logits, target, **options)
    mine = norm_of_gradient(loss, logits)
    plain = norm_of_gradient(F.cross_entropy(logits, target), logits)
    assert mine <= 10 * plain


@pytest.mark.parametrize("logit", [10.0, 20.0, 25.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "emo_anchored_shifted"])
@pytest.mark.parametrize("fused", [False, True])
def test_confident_rows_with_a_table_of_costs(mode, dtype, logit, fused):
    """The weight e / l of "emo_anchored" is at most the largest cost, also where l rounds to 0."""
    logits, target, _ = confident(logit, dtype)
    costs = 1 - torch.eye(1000, dtype=dtype)
    if fused:
        head = torch.eye(1000, dtype=dtype)
        loss = linear_emo_loss(logits, head, target, cost_matrix=costs, **MODES[mode])
    else:
        loss = emo_loss(logits, target, cost_matrix=costs, **MODES[mode])
    plain = norm_of_gradient(F.cross_entropy(logits, target), logits)
    assert norm_of_gradient(loss, logits) <= 10 * plain
    if mode == "emo_anchored" and dtype == torch.float32 and logit == 25.0:
        nll = F.cross_entropy(logits, target)
        cost = (logits.softmax(-1) * costs[target]).sum()
        uncorrected = (cost / (nll + 1e-10)).detach() * nll + cost
        assert norm_of_gradient(uncorrected, logits) > 100 * plain


def test_a_table_with_a_diagonal_is_not_bounded():
    """What the target itself costs stays in the weight, so that formulas are those of the definition."""
    logits, target, _ = problem()
    costs = torch.full((6, 6), 0.5, dtype=torch.float64)
    value = emo_loss(logits, target, cost_matrix=costs, mode="emo_anchored", reduction="none")
    nll = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(value, (0.5 / (nll + 1e-10)).detach() * nll + 0.5)
    assert (0.5 / nll.detach()).max() > 0.5


@modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_with_large_logits_are_finite(mode, dtype):
    logits = torch.zeros(2, 50, dtype=dtype)
    logits[:, 3] = 40.0
    logits.requires_grad_()
    options = {"cost_embedding": torch.randn(50, 8).to(dtype), **MODES[mode]}
    head = torch.eye(50, dtype=dtype)
    target = torch.tensor([3, 4])
    for value in (emo_loss(logits, target, **options), linear_emo_loss(logits, head, target, **options)):
        logits.grad = None
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert logits.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------- the soft bound


def exact_transport(p: Tensor, tau: Tensor, costs: Tensor) -> float:
    optimize = pytest.importorskip("scipy.optimize")
    n = len(p)
    rows = torch.zeros(2 * n, n * n, dtype=torch.float64)
    for i, j in itertools.product(range(n), repeat=2):
        rows[i, i * n + j] = rows[n + j, i * n + j] = 1
    done = optimize.linprog(costs.flatten().numpy(), A_eq=rows.numpy(), b_eq=torch.cat((p, tau)).numpy())
    assert done.status == 0
    return float(done.fun)


@pytest.mark.parametrize("seed", range(5))
def test_bound_is_above_the_exact_transport_and_loose(seed):
    logits, _, meaning = problem(1, seed=seed)
    tau = torch.rand(1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    bound = emo_bound(logits, tau, cost_embedding=meaning).item()
    costs = cosine_costs(meaning, torch.arange(6), torch.float64)
    exact = exact_transport(logits.detach().softmax(-1)[0], tau[0], costs)
    assert exact <= bound + 1e-12
    # It is not even 0 where there is nothing to move.
    assert emo_bound(tau.log(), tau, cost_embedding=meaning) > 0.3


@pytest.mark.parametrize("zero_row", [False, True])
def test_bound_of_a_one_hot_target_is_exact(zero_row):
    logits, target, meaning = problem()
    if zero_row:
        meaning[target[0]] = 0
    one_hot = F.one_hot(target, 6).double()
    bound = emo_bound(logits, one_hot, cost_embedding=meaning, reduction="none")
    exact = emo_loss(logits, target, cost_embedding=meaning, mode="pure", reduction="none")
    torch.testing.assert_close(bound, exact, rtol=1e-12, atol=1e-12)
    weight = torch.rand(9, dtype=torch.float64)
    weighted = emo_bound(logits, one_hot, cost_embedding=meaning, token_weight=weight, normalizer=3)
    torch.testing.assert_close(weighted, (exact * weight).sum() / 3)
    assert torch.autograd.gradcheck(lambda z: emo_bound(z, one_hot, cost_embedding=meaning), logits)


def test_bound_is_the_double_sum():
    logits, _, meaning = problem()
    tau = torch.rand(9, 6, dtype=torch.float64).softmax(-1)
    costs = cosine_costs(meaning, torch.arange(6), torch.float64)
    expected = torch.einsum("ni,nj,ij->n", logits.softmax(-1), tau, costs)
    torch.testing.assert_close(emo_bound(logits, tau, cost_embedding=meaning, reduction="none"), expected)


def test_bad_bound():
    z, tau, meaning = torch.zeros(2, 3), torch.full((2, 3), 1 / 3), torch.eye(3)
    with pytest.raises(ValueError, match="target must hold probabilities in the shape of input"):
        emo_bound(z, tau[:1], cost_embedding=meaning)
    with pytest.raises(TypeError, match="target must be a floating-point tensor"):
        emo_bound(z, torch.zeros(2, 3).long(), cost_embedding=meaning)
    with pytest.raises(ValueError, match="cost_embedding must have 3 rows"):
        emo_bound(z, tau, cost_embedding=torch.eye(4))


# ------------------------------------------------------------------------------------------- the authors' package


@pytest.mark.parametrize(("number", "options"), [(1, {"max_ratio": 3.0}), (2, {"mode": "emo_anchored"})])
@pytest.mark.parametrize("ignored", [False, True])
def test_agrees_with_the_authors_package(number, options, ignored):
    """EMOLoss 0.0.3 shifts the labels itself."""
    theirs = pytest.importorskip("emo").EMOLoss
    logits = torch.randn(2, 8, 30).requires_grad_()
    labels = torch.randint(30, (2, 8))
    if ignored:
        labels[:, ::3] = -100
    meaning = torch.randn(30, 12)
    expected = theirs(logits, labels, meaning, mode=number)
    value = emo_loss(logits[:, :-1], labels[:, 1:], cost_embedding=meaning, **options)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    (mine,) = torch.autograd.grad(value, logits)
    (other,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ transforms, errors


def test_transforms_compile_checkpoint_and_autocast():
    logits, target, meaning = problem(8)
    run = partial(emo_loss, cost_embedding=meaning, label_smoothing=0.1)
    stacked, classes = logits.detach().view(2, 4, 6), target.view(2, 4)
    found = torch.func.vmap(torch.func.grad(run))(stacked, classes)
    for z, y, grad in zip(stacked, classes, found, strict=True):
        torch.testing.assert_close(grad, torch.func.grad(run)(z, y))
    for mode in ("ce_anchored", "emo_anchored"):
        compiled = torch.compile(partial(run, mode=mode), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, target), run(logits, target, mode=mode))
    table = partial(emo_loss, cost_matrix=1 - torch.eye(6, dtype=torch.float64), mode="emo_anchored")
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), table(logits, target))
    again = torch.utils.checkpoint.checkpoint(run, logits, target, use_reentrant=False)
    torch.testing.assert_close(again, run(logits, target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = run(logits.float(), target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), run(logits, target), rtol=1e-5, atol=1e-5)


def test_infinite_loss_of_a_masked_target():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 1.0, 2.0]])
    value = emo_loss(logits, torch.tensor([1, 1]), cost_embedding=torch.eye(3), reduction="none")
    assert value[0] == math.inf
    assert value[1].isfinite()


META = torch.zeros(3, 2, device="meta")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "exactly one of cost_embedding and cost_matrix"),
        (
            {"cost_embedding": torch.eye(3), "cost_matrix": torch.eye(3)},
            ValueError,
            "exactly one of cost_embedding and cost_matrix",
        ),
        ({"cost_embedding": torch.eye(4)}, ValueError, r"cost_embedding must have 3 rows, one per class, got \(4, 4\)"),
        ({"cost_embedding": torch.ones(3)}, ValueError, r"cost_embedding must have shape \(V, E\), got \(3,\)"),
        ({"cost_embedding": torch.ones(3, 2).long()}, TypeError, "cost_embedding must be a floating-point tensor"),
        ({"cost_embedding": [1.0]}, TypeError, r"cost_embedding must be a torch\.Tensor"),
        ({"cost_embedding": META}, ValueError, "cost_embedding on meta"),
        ({"cost_embedding": "tail"}, ValueError, "cost_embedding must be a tensor or 'head', got 'tail'"),
        ({"cost_embedding": "head"}, ValueError, "has a meaning for a linear head only"),
        ({"cost_matrix": torch.ones(3, 2)}, ValueError, r"cost_matrix must have shape \(V, V\), got \(3, 2\)"),
        ({"cost_matrix": -torch.ones(3, 3)}, ValueError, "cost_matrix must hold costs >= 0"),
        ({"cost_matrix": torch.full((3, 3), math.nan)}, ValueError, "cost_matrix must hold costs >= 0"),
        ({"mode": "paper"}, ValueError, "mode must be one of 'ce_anchored', 'emo_anchored', 'fixed', 'pure'"),
        ({"ce_weight": 0.5}, ValueError, "ce_weight and emo_weight belong to mode='fixed'"),
        ({"mode": "fixed", "emo_weight": -1.0}, ValueError, "emo_weight must be in"),
        ({"mode": "pure", "max_ratio": 3.0}, ValueError, "max_ratio belongs to mode='ce_anchored'"),
        ({"max_ratio": 0.0}, ValueError, "max_ratio must be in"),
        ({"min_nll": -1.0}, ValueError, "min_nll must be in"),
        ({"eps": 0.0}, ValueError, "eps must be in"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
    ],
)
def test_bad_options(options, error, match):
    if options and "cost_embedding" not in options and "cost_matrix" not in options:
        options = {"cost_embedding": torch.eye(3), **options}
    with pytest.raises(error, match=match):
        emo_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), **options)
    if options.get("cost_embedding") != "head":
        with pytest.raises(error, match=match):
            linear_emo_loss(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), **options)


def test_bad_cache():
    with pytest.raises(ValueError, match="the head changes with every step"):
        EMO(cost_embedding="head", cost_cache=True)
    with pytest.raises(ValueError, match="a cost_matrix is one already"):
        EMO(cost_matrix=torch.eye(3), cost_cache=True)
    with pytest.raises(ValueError, match="for V up to 50000; got V = 50001"):
        EMO(cost_embedding=torch.empty(50_001, 1), cost_cache=True)
