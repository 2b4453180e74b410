"""ZLPR: golden numbers, soft targets, sparse equals dense, what the usual sparse code gets wrong, masks."""

import math

import pytest
import torch

from danlu.losses import multilabel_cross_entropy

INFINITY = float("inf")


def draw(*shape, dtype=torch.float64, seed=0):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def textbook(scores, positives):
    """The definition, label by label."""
    chosen = [float(scores[i]) for i in positives]
    others = [float(s) for i, s in enumerate(scores) if i not in positives]
    return math.log1p(sum(math.exp(-s) for s in chosen)) + math.log1p(sum(math.exp(s) for s in others))


def usual_sparse(scores, positives):
    """The negatives as all labels minus the positives, with the usual clip."""
    padded = torch.cat((scores, torch.zeros(1, dtype=scores.dtype)))
    everything = padded.logsumexp(0)
    chosen = scores[positives]
    share = (chosen.logsumexp(0) - everything).exp()
    from_negatives = everything + (1 - share).clamp(min=1e-7, max=1).log()
    return torch.cat((-chosen, torch.zeros(1, dtype=scores.dtype))).logsumexp(0) + from_negatives


def test_golden_numbers():
    scores = draw(4, 6)
    for row, positives in zip(scores, ([], [2], [0, 5], [0, 1, 2, 3, 4, 5]), strict=True):
        target = torch.zeros(6, dtype=torch.bool)
        target[positives] = True
        value = multilabel_cross_entropy(row, target)
        assert value.item() == pytest.approx(textbook(row, positives), rel=1e-14)
    assert multilabel_cross_entropy(torch.zeros(1, 3), torch.tensor([[1, 0, 0]])).item() == pytest.approx(
        math.log(2) + math.log(3)
    )


@pytest.mark.parametrize(
    ("scores", "wrong", "right"), [((20.0, -5, -6, -7), 3.88, 0.0101), ((40.0, 2, 1, 0), 23.9, 2.494)]
)
def test_correction_the_usual_sparse_loss_fails_when_a_positive_is_large(scores, wrong, right):
    row = torch.tensor(scores)
    assert usual_sparse(row, torch.tensor([0])).item() == pytest.approx(wrong, rel=2e-3)
    assert multilabel_cross_entropy(row, torch.tensor([0]), sparse=True).item() == pytest.approx(right, rel=5e-3)
    exact = textbook(row.double(), [0])
    assert multilabel_cross_entropy(row, torch.tensor([0]), sparse=True).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sparse_equals_dense(dtype):
    scores = draw(5, 3, 9, dtype=dtype)
    scores[0, 0, 4], scores[1, 2, 0] = 50.0, -50.0
    lists = torch.full((5, 3, 4), -1)
    generator = torch.Generator().manual_seed(1)
    for b in range(5):
        for t in range(3):
            count = int(torch.randint(5, (1,), generator=generator))
            lists[b, t, :count] = torch.randperm(9, generator=generator)[:count]
    lists[0, 0, 0], lists[0, 0, 2] = 4, 4
    lists[2, 2] = torch.tensor([3, -1, 3, 3])  # gaps and repetitions
    target = torch.zeros(5, 3, 10).scatter(-1, lists.masked_fill(lists < 0, 9), 1.0)[..., :9]
    mask = draw(5, 3, 9, seed=2) > -3
    mask |= target.bool()
    for options in ({}, {"mask": mask}, {"threshold": 0.7}):
        found = []
        for kind, sparse in ((lists, True), (target.bool(), False), (target.long(), False), (target, False)):
            leaf = scores.clone().requires_grad_()
            rows = multilabel_cross_entropy(leaf, kind, sparse=sparse, reduction="none", **options)
            (rows * torch.linspace(-1, 2, 15, dtype=dtype).view(5, 3)).sum().backward()
            found.append((rows.detach(), leaf.grad))
        limit = 1e-12 if dtype == torch.float64 else 1e-6
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=limit, atol=limit)


def test_gradient_identities():
    """One positive, no mask: e^s / (1 + sum) for a negative, -e^-s / (1 + e^-s) for the positive."""
    scores = draw(7).requires_grad_()
    multilabel_cross_entropy(scores, torch.tensor([3]), sparse=True).backward()
    s = scores.detach()
    others = torch.arange(7) != 3
    weights = s.exp() / (1 + s[others].exp().sum())
    torch.testing.assert_close(scores.grad[others], weights[others], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(scores.grad[3], -torch.sigmoid(-s[3]), rtol=1e-13, atol=1e-15)


def test_soft_targets_are_met_at_twice_the_score():
    t = torch.tensor([0.9, 0.5, 0.2, 0.01], dtype=torch.float64)
    best = (0.5 * torch.logit(t)).requires_grad_()
    value = multilabel_cross_entropy(best, t)
    (slope,) = torch.autograd.grad(value, best, create_graph=True)
    assert slope.abs().max() < 1e-15
    torch.testing.assert_close((2 * best).sigmoid(), t)
    assert value.item() == pytest.approx(2 * math.log1p((t * (1 - t)).sqrt().sum().item()), rel=1e-14)
    # sigma(s) would be the wrong reading: there the loss is not least.
    assert multilabel_cross_entropy(torch.logit(t), t) > value + 1e-3
    for direction in torch.eye(4, dtype=torch.float64):
        for step in (-1e-3, 1e-3):
            assert multilabel_cross_entropy(best.detach() + step * direction, t) > value


def test_gradcheck():
    scores = draw(2, 3, 5).requires_grad_()
    hard = draw(2, 3, 5, seed=4) > 1
    soft = draw(2, 3, 5, seed=5).sigmoid()
    lists = torch.tensor([[0, 3], [-1, -1], [2, -1]]).expand(2, 3, 2)
    mask = draw(2, 3, 5, seed=6) > -2
    mask[..., [0, 2, 3]] = True
    for target, options in ((hard, {}), (soft, {}), (lists, {"sparse": True}), (lists, {"sparse": True, "mask": mask})):
        for reduction in ("none", "mean", "sum"):
            call = lambda z, t=target, o=options, r=reduction: multilabel_cross_entropy(z, t, reduction=r, **o)  # noqa: E731
            assert torch.autograd.gradcheck(call, scores, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(call, scores)
    threshold = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, c: multilabel_cross_entropy(z, hard, threshold=c), (scores, threshold))


def test_reductions():
    scores, target = draw(2, 4, 5), draw(2, 4, 5, seed=1) > 0
    rows = multilabel_cross_entropy(scores, target, reduction="none")
    assert rows.shape == (2, 4)
    torch.testing.assert_close(multilabel_cross_entropy(scores, target), rows.mean())
    torch.testing.assert_close(multilabel_cross_entropy(scores, target, reduction="sum"), rows.sum())
    # The sum over types, the mean over samples.
    torch.testing.assert_close(multilabel_cross_entropy(scores, target, normalizer=2), rows.sum(1).mean())
    for empty in (scores[:0], scores[:, :0]):
        assert multilabel_cross_entropy(empty, target[: empty.shape[0], : empty.shape[1]]) == 0


def test_threshold_moves_the_line():
    scores, target = draw(3, 5), draw(3, 5, seed=1) > 0
    expected = multilabel_cross_entropy(scores - 1.5, target)
    assert torch.equal(multilabel_cross_entropy(scores, target, threshold=1.5), expected)
    per_label = torch.full((5,), 1.5, dtype=torch.float64)
    assert torch.equal(multilabel_cross_entropy(scores, target, threshold=per_label), expected)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("filler", [INFINITY, -INFINITY, float("nan"), 1e4])
def test_what_is_masked_is_not_looked_at(filler, sparse):
    scores = draw(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:], mask[1] = False, False
    target = torch.tensor([[1, 2], [-1, -1]]) if sparse else torch.tensor([[0, 1, 1, 0, 0, 0], [0] * 6])
    changed = scores.masked_fill(~mask, filler).requires_grad_()
    rows = multilabel_cross_entropy(changed, target, sparse=sparse, mask=mask, reduction="none")
    assert rows[1] == 0  # nothing counts
    assert rows[0].item() == pytest.approx(textbook(scores[0, :4], [1, 2]), rel=1e-14)
    rows.sum().backward()
    assert (changed.grad[~mask] == 0).all()
    assert (changed.grad[0, :4] != 0).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_extreme_scores(sparse):
    target = torch.tensor([[0], [-1], [2]]) if sparse else torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1]])
    scores = torch.tensor([[1e4, -1e4, 3], [-INFINITY, 1, -INFINITY], [0, 1e4, -1e4]], requires_grad=True)
    rows = multilabel_cross_entropy(scores, target, sparse=sparse, reduction="none")
    assert rows[0].item() == pytest.approx(math.log1p(math.exp(3)))
    assert rows[1].item() == pytest.approx(math.log1p(math.e))  # -inf is a mask
    assert rows[2] == 2e4
    rows.sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[1].tolist() == [0, pytest.approx(1 / (1 + math.exp(-1))), 0]
    lost = multilabel_cross_entropy(torch.tensor([[-INFINITY, 0, 0]]), torch.tensor([[0]]), sparse=True)
    assert lost == INFINITY
    broken = scores.detach().clone()
    broken[1, 2] = float("nan")
    rows = multilabel_cross_entropy(broken, target, sparse=sparse, reduction="none")
    assert rows.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_computed_in_float32(dtype):
    scores, target = draw(3, 50, dtype=dtype), draw(3, 50, seed=1) > 2
    value = multilabel_cross_entropy(scores, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), multilabel_cross_entropy(scores.double(), target), rtol=1e-6, atol=0)
    scores.requires_grad_()
    multilabel_cross_entropy(scores, target).backward()
    assert scores.grad.dtype == dtype


def test_transforms():
    scores, lists = draw(4, 5), torch.tensor([[0, 2], [1, -1], [-1, -1], [4, 3]])
    call = lambda z, t: multilabel_cross_entropy(z, t, sparse=True)  # noqa: E731
    mapped = torch.func.vmap(call)(scores, lists)
    torch.testing.assert_close(mapped, multilabel_cross_entropy(scores, lists, sparse=True, reduction="none"))
    slopes = torch.func.vmap(torch.func.grad(call))(scores, lists)
    leaf = scores.clone().requires_grad_()
    multilabel_cross_entropy(leaf, lists, sparse=True, reduction="sum").backward()
    torch.testing.assert_close(slopes, leaf.grad)


SCORES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("target", "options", "error", "match"),
    [
        ([[0]], {}, TypeError, r"target must be a torch\.Tensor"),
        (torch.zeros(2, 3, dtype=torch.complex64), {}, TypeError, "bool, integer or floating"),
        (torch.zeros(2, 2), {}, ValueError, r"got input \(2, 3\) and target \(2, 2\)"),
        (torch.zeros(3, 1).long(), {"sparse": True}, ValueError, "the batch axes of input"),
        (torch.zeros(2, 1), {"sparse": True}, TypeError, "a sparse target must be int64"),
        (torch.full((2, 3), 1.5), {}, ValueError, r"target must be in \[0, 1\], got one at \(0, 0\)"),
        (torch.full((2, 3), float("nan")), {}, ValueError, r"target must be in \[0, 1\]"),
        (torch.full((2, 3), 2), {}, ValueError, "target must be 0 or 1"),
        (torch.tensor([[0], [3]]), {"sparse": True}, ValueError, r"in \[0, 3\), or -1, got one at \(1, 0\)"),
        (torch.tensor([[0], [-2]]), {"sparse": True}, ValueError, r"got one at \(1, 0\)"),
        (SCORES, {"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor"),
        (SCORES, {"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask of shape \(4,\) does not broadcast"),
        (SCORES, {"reduction": "avg"}, ValueError, "reduction must be one of"),
        (SCORES, {"threshold": "x"}, TypeError, "threshold must be a real number"),
        (SCORES, {"threshold": torch.zeros(4, 2, 3)}, ValueError, "threshold of shape"),
    ],
)
def test_bad_input(target, options, error, match):
    with pytest.raises(error, match=match):
        multilabel_cross_entropy(SCORES, target, **options)


def test_positives_that_are_masked_are_named():
    mask = torch.tensor([[True, True, False]])
    for target, sparse in ((torch.tensor([[2]]), True), (torch.tensor([[0, 0, 1]]), False)):
        with pytest.raises(ValueError, match=r"a positive must not be masked, got one at \(0, 2\)"):
            multilabel_cross_entropy(torch.zeros(1, 3), target, sparse=sparse, mask=mask)
    with pytest.raises(TypeError, match="input must be a floating-point tensor"):
        multilabel_cross_entropy(torch.zeros(1, 3).long(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least one label"):
        multilabel_cross_entropy(torch.zeros(1, 0), torch.zeros(1, 0))
