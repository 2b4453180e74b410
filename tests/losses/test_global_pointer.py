"""The fused span loss equals the dense one: values, gradients, padding, shared queries, memory, errors."""

import math

import pytest
import torch

from danlu.losses import _global_pointer_engine as engine
from danlu.losses import global_pointer_loss, multilabel_cross_entropy

B, T, N, D = 3, 4, 7, 6
SPANS = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 5], [0, 3, 2, 2], [1, 1, 0, 4], [2, 0, 6, 6]])
MASK = torch.ones(B, N, dtype=torch.bool)
MASK[1, 5:] = False
shared_or_not = pytest.mark.parametrize("shared", [False, True])


def heads(shared=False, *, dtype=torch.float64, seed=0, size=(B, T, N, D)):
    generator = torch.Generator().manual_seed(seed)
    samples, types, tokens, channels = size
    shape = (samples, tokens, channels) if shared else size
    shapes = [shape, shape, (samples, types, tokens), (samples, types, tokens)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def dense(query, key, start, end, spans, *, mask=None, causal=True, scale=None, threshold=0.0):
    """One loss per sample and type, from all scores at once."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * query @ key.transpose(-1, -2)
    if query.ndim == 3:
        scores = scores[:, None]
    if start is not None:
        scores = scores + start[..., None] + end[..., None, :]
    samples, types, tokens, _ = scores.shape
    target = torch.zeros(samples, types, tokens, tokens, dtype=torch.bool)
    target[tuple(spans[(spans >= 0).all(1)].T)] = True
    visible = torch.ones(tokens, tokens, dtype=torch.bool)
    visible = (visible.triu() if causal else visible).expand(samples, 1, tokens, tokens)
    if mask is not None:
        visible = visible & mask[:, None, :, None] & mask[:, None, None, :]
    flat = scores.flatten(-2), target.flatten(-2)
    return multilabel_cross_entropy(*flat, mask=visible.flatten(-2), threshold=threshold, reduction="none")


def compare(fused, reference, leaves, limit=1e-14):
    torch.testing.assert_close(fused, reference, rtol=limit, atol=limit)
    mine, theirs = (torch.autograd.grad(value.sum(), leaves, retain_graph=True) for value in (fused, reference))
    torch.testing.assert_close(mine, theirs, rtol=10 * limit, atol=limit)


@shared_or_not
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_dense_loss(shared, mask, causal):
    leaves = heads(shared)
    q, k, u, v = leaves
    filled = torch.cat((SPANS[[3, 1]], torch.full((2, 4), -1), SPANS))  # in any order, twice, with filling
    options = {"mask": mask, "causal_mask": causal, "start_bias": u, "end_bias": v}
    reference = dense(*leaves, SPANS, mask=mask, causal=causal)
    compare(global_pointer_loss(q, k, filled, **options), reference.sum() / B, leaves)
    compare(global_pointer_loss(q, k, filled, reduction="sum", **options), reference.sum(), leaves)
    compare(global_pointer_loss(q, k, filled, normalizer=torch.tensor(7), **options), reference.sum() / 7, leaves)
    weights = torch.linspace(-1, 2, B * T, dtype=torch.float64).view(B, T)
    rows = global_pointer_loss(q, k, filled, reduction="none", **options)
    compare(rows * weights, reference * weights, leaves)
    if not shared:
        plain = {"mask": mask, "causal_mask": causal}
        reference = dense(q, k, None, None, SPANS, mask=mask, causal=causal)
        compare(global_pointer_loss(q, k, filled, **plain), reference.sum() / B, [q, k])


@shared_or_not
def test_blocks_of_any_size_give_the_same(shared, monkeypatch):
    leaves = heads(shared)
    found = []
    for size in (1, 2 * N * N, 10**6):
        monkeypatch.setattr(engine, "_BLOCK", size)
        value = global_pointer_loss(*leaves[:2], SPANS, mask=MASK, start_bias=leaves[2], end_bias=leaves[3])
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-14, atol=1e-16)


def test_options():
    leaves = heads()
    reference = dense(*leaves, SPANS, scale=0.7, threshold=0.4).sum() / B
    q, k, u, v = leaves
    compare(global_pointer_loss(q, k, SPANS, start_bias=u, end_bias=v, scale=0.7, threshold=0.4), reference, leaves)


@shared_or_not
def test_gradcheck(shared):
    leaves = heads(shared, size=(2, 2, 3, 2))
    spans = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]])
    for reduction in ("mean", "none"):
        call = lambda q, k, u, v, r=reduction: global_pointer_loss(q, k, spans, start_bias=u, end_bias=v, reduction=r)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves)


def test_only_what_is_needed_gets_a_gradient():
    leaves = heads()
    for i in range(4):
        given = [leaf.detach().requires_grad_(j == i) for j, leaf in enumerate(leaves)]
        value = global_pointer_loss(*given[:2], SPANS, start_bias=given[2], end_bias=given[3])
        value.backward()
        assert [leaf.grad is not None for leaf in given] == [j == i for j in range(4)]
        expected = torch.autograd.grad(dense(*leaves, SPANS).sum() / B, leaves[i])[0]
        torch.testing.assert_close(given[i].grad, expected)


def test_backward_twice_and_accumulation():
    leaves = heads()
    q, k = leaves[:2]
    value = 3 * global_pointer_loss(q, k, SPANS)
    first = torch.autograd.grad(value, (q, k), retain_graph=True)
    second = torch.autograd.grad(value, (q, k))
    torch.testing.assert_close(first, second)
    parts = []
    for i in range(B):
        alone = SPANS[SPANS[:, 0] == i] * torch.tensor([0, 1, 1, 1])
        parts.append(global_pointer_loss(q[i : i + 1], k[i : i + 1], alone, normalizer=B))
    torch.testing.assert_close(sum(parts), global_pointer_loss(q, k, SPANS))
    torch.testing.assert_close(torch.autograd.grad(sum(parts), (q, k)), tuple(g / 3 for g in first))


@shared_or_not
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e4])
def test_padding_and_reversed_spans_change_nothing(shared, filler):
    leaves = heads(shared)
    options = {"mask": MASK, "start_bias": leaves[2], "end_bias": leaves[3]}
    value = global_pointer_loss(*leaves[:2], SPANS, **options)
    expected = torch.autograd.grad(value, leaves)
    changed = [leaf.detach().clone() for leaf in leaves]
    for leaf in changed[:2]:
        (leaf[1] if shared else leaf[1].transpose(0, 1))[5:] = filler
    for leaf in changed[2:]:
        leaf[1, :, 5:] = filler
    changed = [leaf.requires_grad_() for leaf in changed]
    again = global_pointer_loss(
        *changed[:2], SPANS, mask=MASK, start_bias=changed[2], end_bias=changed[3], reduction="mean"
    )
    assert torch.equal(again, value)
    for mine, theirs in zip(torch.autograd.grad(again, changed), expected, strict=True):
        assert torch.equal(mine, theirs)
        row = mine[1] if shared and mine.ndim == 3 and mine.shape[-1] == D else mine[1].transpose(0, 1)
        assert (row[5:] == 0).all()
    # The last token cannot begin a span that ends before it: of its query only one score counts.
    q, k = heads()[:2]
    loss = global_pointer_loss(q, k, SPANS)
    moved = k.detach().clone()
    moved[:, :, 0] += 5  # key of the first token: only spans (0, 0) end there
    others = global_pointer_loss(q, moved, SPANS).detach() - loss.detach()
    assert others != 0
    slope = torch.autograd.grad(global_pointer_loss(q, moved, SPANS[1:]), q)[0]
    plain = torch.autograd.grad(dense(q, moved, None, None, SPANS[1:]).sum() / B, q)[0]
    torch.testing.assert_close(slope, plain)


def test_nan_stays_in_its_sample_and_type():
    q, k = (x.detach().clone() for x in heads()[:2])
    q[0, 1, 2, 0] = float("nan")
    q.requires_grad_()
    rows = global_pointer_loss(q, k, SPANS, reduction="none")
    assert rows.isnan().nonzero().tolist() == [[0, 1]]
    rows.sum().backward()
    kept = torch.ones(B, T, dtype=torch.bool)
    kept[0, 1] = False
    assert q.grad[kept].isfinite().all()


def test_nothing_to_score():
    q, k = heads()[:2]
    none = SPANS[:0]
    hidden = torch.zeros(B, N, dtype=torch.bool)
    rows = global_pointer_loss(q, k, none, mask=hidden, reduction="none")
    assert (rows == 0).all()
    rows.sum().backward()
    assert (q.grad == 0).all()
    assert (k.grad == 0).all()
    expected = dense(q, k, None, None, none)
    torch.testing.assert_close(global_pointer_loss(q, k, none, reduction="none"), expected)
    for empty in (q[:0], q[:, :, :0]):
        value = global_pointer_loss(empty, empty, none)
        assert value == 0
        value.backward()


def test_large_scores():
    q = torch.full((1, 1, 3, 4), 100.0, requires_grad=True)
    k = torch.tensor([100.0, -100.0, 100.0])[:, None].expand(1, 1, 3, 4).clone().requires_grad_()
    spans = torch.tensor([[0, 0, 0, 1]])
    value = global_pointer_loss(q, k, spans)
    expected = dense(q.double(), k.double(), None, None, spans).sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    value.backward()
    assert q.grad.isfinite().all()
    # A small loss keeps its digits: log(1 + 3 e^-40) is not 0 in float32.
    sure = global_pointer_loss(torch.full((1, 1, 2, 1), -40.0), torch.ones(1, 1, 2, 1), SPANS[:0])
    assert sure.item() == pytest.approx(3 * math.exp(-40), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@shared_or_not
def test_lower_precision(dtype, shared):
    leaves = [x.detach().to(dtype).requires_grad_() for x in heads(shared)]
    value = global_pointer_loss(*leaves[:2], SPANS, mask=MASK, start_bias=leaves[2], end_bias=leaves[3])
    assert value.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in leaves]
    reference = dense(*exact, SPANS, mask=MASK).sum() / B
    torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=1e-6)
    limit = 4 * torch.finfo(dtype).eps
    for mine, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(reference, exact), strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= limit * theirs.abs().max()


def test_no_second_derivative_and_no_transforms():
    q, k = heads()[:2]
    (slope,) = torch.autograd.grad(global_pointer_loss(q, k, SPANS), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative; take multilabel_cross_entropy"):
        slope.sum().backward()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda x: global_pointer_loss(x, k, SPANS), (q.detach(),), (q.detach(),))
    with pytest.raises(RuntimeError, match="does not work under vmap"):
        torch.func.vmap(lambda x: global_pointer_loss(x, k, SPANS))(q.detach()[None])
    found = torch.func.grad(lambda x: global_pointer_loss(x, k.detach(), SPANS))(q.detach())
    torch.testing.assert_close(found, torch.autograd.grad(global_pointer_loss(q, k, SPANS), q)[0])


@shared_or_not
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiles_as_one_graph(shared, reduction, dtype):
    """As an operator with the gradients of the eager loss, which has a fake for shapes and no second derivative."""
    leaves = heads(shared, dtype=dtype)
    weights = torch.linspace(-1, 2, B * T, dtype=torch.float64).view(B, T) if reduction == "none" else 3.0

    def call(q, k, u, v):
        rows = global_pointer_loss(q, k, SPANS, mask=MASK, start_bias=u, end_bias=v, reduction=reduction)
        return (rows * weights).sum()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*leaves), call(*leaves)
    torch.testing.assert_close(value, expected, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), value.detach())
    # Only what is needed.
    some = torch.autograd.grad(compiled(*(x.detach() for x in leaves[:3]), leaves[3]), leaves[3])[0]
    found = torch.autograd.grad(value, leaves, retain_graph=True)
    for mine, theirs in zip((*found, some), (*torch.autograd.grad(expected, leaves), found[3]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13 if dtype == torch.float64 else 1e-2, atol=1e-14)
    if reduction == "mean":
        plain = torch.compile(lambda q, k: global_pointer_loss(q, k, SPANS, scale=0.5), fullgraph=True, backend="eager")
        if not shared:
            torch.testing.assert_close(plain(*leaves[:2]), global_pointer_loss(*leaves[:2], SPANS, scale=0.5))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(compiled(*leaves), leaves[0], create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiler_that_asks_for_no_gradients_of_its_own_is_refused_the_second_derivative(reduction):
    q, k = heads()[:2]

    def call(q, k):
        return global_pointer_loss(q, k, SPANS, reduction=reduction).sum()

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    (slope,) = torch.autograd.grad(compiled(q, k), q, create_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(call(q, k), q)[0], rtol=1e-13, atol=1e-14)
    with pytest.raises(RuntimeError, match="has no second derivative; take multilabel_cross_entropy"):
        slope.square().sum().backward()


def test_never_all_scores_at_once(monkeypatch):
    """No tensor of the size of all scores, nor even of those of one type, is ever made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    q, k = heads(size=(6, 3, 64, 4))[:2]
    monkeypatch.setattr(engine, "_BLOCK", 2 * 64 * 64)
    with Watch():
        global_pointer_loss(q, k, SPANS[:2]).backward()
    assert largest == 2 * 64 * 64
    assert largest < 6 * 64 * 64 < 6 * 3 * 64 * 64


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"query": torch.zeros(2, 3, 4, 5).long()}, TypeError, "query must be a floating-point"),
        ({"key": torch.zeros(2, 3, 4, 6)}, ValueError, r"one shape \(B, T, n, D\) or \(B, n, D\)"),
        ({"query": torch.zeros(4, 5), "key": torch.zeros(4, 5)}, ValueError, "must have one shape"),
        ({"key": torch.zeros(2, 3, 4, 5, dtype=torch.float64)}, TypeError, "must have one dtype"),
        ({"query": torch.zeros(2, 4, 5), "key": torch.zeros(2, 4, 5)}, ValueError, "share queries need both"),
        ({"start_bias": torch.zeros(2, 3, 4)}, ValueError, "go together"),
        (
            {"start_bias": torch.zeros(2, 3, 4), "end_bias": torch.zeros(2, 4, 4)},
            ValueError,
            r"end_bias must have shape \(B, T, n\)",
        ),
        ({"spans": torch.zeros(1, 4)}, TypeError, "spans must be an int64 tensor, got torch.float32"),
        ({"spans": torch.zeros(1, 3).long()}, ValueError, r"spans must have shape \(S, 4\)"),
        ({"spans": torch.tensor([[0, 0, 0, 0], [2, 0, 0, 0]])}, ValueError, r"lie in 2 samples.*got one at \(1,\)"),
        ({"spans": torch.tensor([[0, -1, 0, 0]])}, ValueError, "or be -1 throughout"),
        ({"spans": torch.tensor([[0, 0, 0, 4]])}, ValueError, "4 tokens"),
        ({"spans": torch.tensor([[0, 0, 2, 1]])}, ValueError, r"must not end before it starts, got one at \(0,\)"),
        (
            {"spans": torch.tensor([[0, 0, 0, 0], [1, 0, 0, 3]]), "mask": torch.arange(4) < torch.tensor([[4], [3]])},
            ValueError,
            r"a span must not touch padding, got one at \(1,\)",
        ),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"mask must have shape \(B, n\) = \(2, 4\)"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"normalizer": 0.0}, ValueError, "normalizer must be in"),
        ({"scale": "1"}, TypeError, "scale must be a real number"),
        ({"threshold": None}, TypeError, "threshold must be a real number"),
    ],
)
def test_bad_input(changes, error, match):
    given = {"query": torch.zeros(2, 3, 4, 5), "key": torch.zeros(2, 3, 4, 5), "spans": torch.zeros(1, 4).long()}
    with pytest.raises(error, match=match):
        global_pointer_loss(**given | changes)
