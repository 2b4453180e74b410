"""Span scores: the equation, relative positions, padding, types, parameter counts, and what is read off them."""

import math

import pytest
import torch

from danlu.attention import EfficientGlobalPointer, GlobalPointer, decode_spans
from danlu.losses import global_pointer_loss, multilabel_cross_entropy
from danlu.positions import apply_rope, rope_frequencies

both = pytest.mark.parametrize("cls", [GlobalPointer, EfficientGlobalPointer])
INFINITY = float("inf")
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def build(cls, dtype=torch.float64, **options):
    torch.manual_seed(1)
    return cls(10, 3, head_size=8, **options).to(dtype)


def hidden(samples=2, tokens=6, dtype=torch.float64):
    return torch.randn(samples, tokens, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def rotate(x, positions):
    """Pairs of neighbors turned by p b^(-2m/D), number by number."""
    out = torch.empty_like(x)
    for i, p in enumerate(positions):
        for m in range(x.shape[-1] // 2):
            angle = p * 10000.0 ** (-2 * m / x.shape[-1])
            a, b = x[..., i, 2 * m], x[..., i, 2 * m + 1]
            out[..., i, 2 * m] = a * math.cos(angle) - b * math.sin(angle)
            out[..., i, 2 * m + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def test_global_pointer_is_the_equation():
    module, h = build(GlobalPointer), hidden()
    weight, offset = module.dense.weight.view(3, 2, 8, 10), module.dense.bias.view(3, 2, 8)
    scores = module(h)
    for kind in range(3):
        q, k = (rotate(h @ weight[kind, i].T + offset[kind, i], range(6)) for i in range(2))
        expected = q @ k.transpose(1, 2) / math.sqrt(8)
        upper = torch.ones(6, 6).triu().bool()
        torch.testing.assert_close(scores[:, kind][:, upper], expected[:, upper], rtol=1e-12, atol=1e-13)
        assert (scores[:, kind][:, ~upper] == -INFINITY).all()


def test_efficient_global_pointer_is_the_equation():
    module, h = build(EfficientGlobalPointer, causal_mask=False), hidden()
    plain = h @ module.dense.weight.T + module.dense.bias
    q, k = (rotate(x, range(6)) for x in (plain[..., :8], plain[..., 8:]))
    biases = 0.5 * (plain @ module.types.weight.T + module.types.bias)
    base = q @ k.transpose(1, 2) / math.sqrt(8)
    scores = module(h)
    for kind in range(3):
        expected = base + biases[:, :, None, kind] + biases[:, None, :, 3 + kind]
        torch.testing.assert_close(scores[:, kind], expected, rtol=1e-12, atol=1e-13)


def test_rope_is_interleaved_with_base_ten_thousand():
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(
        rotate(x, range(5)), apply_rope(x, torch.arange(5), rope_frequencies(8), interleaved=True)
    )


def test_parameter_counts():
    """Of the trial's heads; and per further type 2 D H against 4 D weights."""
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(GlobalPointer(128, 6, head_size=32)) == 49_536
    assert count(EfficientGlobalPointer(128, 6, head_size=32)) == 9_036
    for cls, more in ((GlobalPointer, 2 * 64 * 768), (EfficientGlobalPointer, 4 * 64)):
        assert count(cls(768, 8, bias=False)) - count(cls(768, 7, bias=False)) == more


@both
def test_scores_depend_on_differences_of_positions(cls):
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        module, h = build(cls, dtype, causal_mask=False), hidden(dtype=dtype)
        moved = module(h, positions=torch.arange(6) + 7)
        assert (moved - module(h)).abs().max() <= limit
        assert torch.equal(module(h, positions=torch.arange(6).expand(2, 6)), module(h))
    assert not torch.allclose(module(h), build(cls, causal_mask=False, rope=False)(h))
    without = build(cls, causal_mask=False, rope=False)
    flipped = without(h.flip(1)).flip(2, 3)
    torch.testing.assert_close(flipped, without(h), rtol=1e-12, atol=1e-13)  # blind to positions


@both
def test_padding_changes_nothing(cls):
    module, h = build(cls), hidden()
    scores = module(h, MASK)
    assert (scores[1, :, 4:] == -INFINITY).all()
    assert (scores[1, :, :, 4:] == -INFINITY).all()
    torch.testing.assert_close(scores[1, :, :4, :4], module(h[1:, :4])[0], rtol=1e-12, atol=1e-13)
    for filler in (1e4, float("nan")):
        changed = h.clone()
        changed[1, 4:] = filler
        changed.requires_grad_()
        again = module(changed, MASK)
        assert torch.equal(again, scores)
        again.masked_fill(again.isinf(), 0.0).sum().backward()
        assert (changed.grad[1, 4:] == 0).all()
        assert changed.grad.isfinite().all()


@both
def test_loss_ignores_what_is_hidden(cls):
    """The dense loss with scores of -inf, the dense loss with a mask and finite scores, and the fused one."""
    module, h = build(cls), hidden().requires_grad_()
    spans = torch.tensor([[0, 0, 1, 2], [1, 2, 0, 3], [0, 1, 5, 5]])
    target = torch.zeros(2, 3, 6, 6, dtype=torch.bool)
    target[tuple(spans.T)] = True
    visible = torch.ones(6, 6, dtype=torch.bool).triu() & MASK[:, None, :, None] & MASK[:, None, None, :]
    scores = module(h, MASK)
    from_infinite = multilabel_cross_entropy(scores.flatten(-2), target.flatten(-2), normalizer=2)
    finite = torch.where(visible, scores, -1e4)
    from_mask = multilabel_cross_entropy(finite.flatten(-2), target.flatten(-2), mask=visible.flatten(-2), normalizer=2)
    query, key, *biases = module.project(h, MASK)
    options = dict(zip(("start_bias", "end_bias"), biases, strict=False))
    fused = global_pointer_loss(query, key, spans, mask=MASK, **options)
    leaves = [h, *module.parameters()]
    found = [
        (value.detach(), *torch.autograd.grad(value, leaves, retain_graph=True))
        for value in (from_infinite, from_mask, fused)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-11, atol=1e-13)


def test_permuting_types_permutes_scores():
    order = torch.tensor([2, 0, 1])
    module, h = build(GlobalPointer), hidden()
    scores = module(h)
    with torch.no_grad():
        for p in module.dense.parameters():
            p.copy_(p.view(3, -1)[order].view_as(p))
    torch.testing.assert_close(module(h), scores[:, order], rtol=1e-13, atol=1e-14)
    efficient = build(EfficientGlobalPointer)
    scores = efficient(h)
    with torch.no_grad():
        for p in efficient.types.parameters():
            p.copy_(p.view(2, 3, -1)[:, order].view_as(p))
    torch.testing.assert_close(efficient(h), scores[:, order], rtol=1e-13, atol=1e-14)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_inputs_are_float32(cls, dtype):
    module, h = build(cls, dtype), hidden(dtype=dtype)
    scores = module(h, MASK)
    assert scores.dtype == torch.float32
    exact = module.double()(h.double(), MASK)
    seen = exact.isfinite()
    assert torch.equal(scores.isfinite(), seen)
    limit = 16 * torch.finfo(dtype).eps
    assert (scores.double() - exact)[seen].abs().max() <= limit * exact[seen].abs().max()
    large = build(cls, dtype)
    with torch.no_grad():
        large.dense.weight.mul_(300)
    assert large(h, MASK)[seen].isfinite().all()  # beyond the largest float16


@both
def test_state_and_repr(cls):
    module = build(cls)
    assert all(name.split(".")[0] in ("dense", "types") for name in module.state_dict())
    assert "num_types=3, head_size=8, causal_mask=True" in repr(module)
    twin = cls(10, 3, head_size=8).double()
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(hidden()), module(hidden()))
    assert all("bias" not in name for name in cls(10, 3, bias=False).state_dict())


@both
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"head_size": 7}, ValueError, "head_size must be even, since RoPE rotates pairs of channels, got 7"),
        ({"head_size": 0}, ValueError, "head_size must be at least 2"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1"),
        ({"num_types": 0}, ValueError, "num_types must be at least 1"),
        ({"num_types": 2.0}, TypeError, "num_types must be an int"),
    ],
)
def test_bad_sizes(cls, options, error, match):
    with pytest.raises(error, match=match):
        cls(**{"hidden_size": 4, "num_types": 2, **options})


@both
@pytest.mark.parametrize(
    ("h", "mask", "error", "match"),
    [
        (torch.zeros(2, 6, 9), None, ValueError, r"hidden must have shape \(B, n, 10\)"),
        (torch.zeros(6, 10), None, ValueError, "hidden must have shape"),
        (torch.zeros(2, 6, 10).long(), None, TypeError, "hidden must be a floating-point tensor"),
        (torch.zeros(2, 6, 10), torch.ones(2, 6), TypeError, "mask must be a bool tensor"),
        (torch.zeros(2, 6, 10), torch.ones(2, 5, dtype=torch.bool), ValueError, r"mask must have shape \(B, n\)"),
    ],
)
def test_bad_input(cls, h, mask, error, match):
    with pytest.raises(error, match=match):
        build(cls, torch.float32)(h, mask)


def brute_force(scores, mask, threshold, max_length):
    found = []
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            for i in range(scores.shape[2]):
                for j in range(i, scores.shape[2]):
                    near = max_length is None or j - i < max_length
                    if near and mask[b, i] and mask[b, j] and scores[b, t, i, j] > threshold:
                        found.append((b, t, i, j))
    return found


@pytest.mark.parametrize("threshold", [0.0, 0.8, -0.5])
@pytest.mark.parametrize("max_length", [None, 1, 3])
def test_decoding_is_every_score_above_the_threshold(threshold, max_length):
    scores = torch.randn(2, 3, 6, 6)
    scores[0, 0, 1, 2] = float("nan")
    spans = decode_spans(scores, MASK, threshold=threshold, max_length=max_length)
    rows = [tuple(row) for row in spans.tolist()]
    assert sorted(rows) == brute_force(scores, MASK, threshold, max_length)
    keys = [(row[0], -float(scores[row])) for row in rows]
    assert keys == sorted(keys)  # by sample and falling score
    assert spans.dtype == torch.int64


def test_flat_decoding_keeps_the_highest_of_what_overlaps():
    scores = torch.full((2, 2, 6, 6), -1.0)
    scores[0, 0, 0, 4], scores[0, 1, 1, 2], scores[0, 0, 3, 3] = 3.0, 5.0, 2.0
    scores[0, 1, 4, 5], scores[1, 0, 0, 4] = 4.0, 1.0
    assert decode_spans(scores, allow_nested=False).tolist() == [[0, 1, 1, 2], [0, 1, 4, 5], [0, 0, 3, 3], [1, 0, 0, 4]]
    assert len(decode_spans(scores)) == 5
    assert decode_spans(scores[:0]).shape == (0, 4)
    assert decode_spans(torch.full((1, 1, 2, 2), -INFINITY), allow_nested=False).shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"scores": torch.zeros(1, 1, 2, 2).long()}, TypeError, "scores must be a floating-point tensor"),
        ({"scores": torch.zeros(1, 1, 2, 3)}, ValueError, r"scores must have shape \(B, T, n, n\)"),
        ({"mask": torch.ones(1, 2)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"threshold": "0"}, TypeError, "threshold must be a real number"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1"),
    ],
)
def test_bad_decoding(changes, error, match):
    with pytest.raises(error, match=match):
        decode_spans(**{"scores": torch.zeros(1, 1, 2, 2), **changes})
