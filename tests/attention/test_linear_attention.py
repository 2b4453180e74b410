"""Linear attention: the definition, causality, decoding, rotation, padding, dtypes, bad input."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from danlu.attention import (
    FavorFeatures,
    LinearAttention,
    LinearAttentionState,
    SoftVQFeatures,
    feature_map,
    linear_attention,
    linear_attention_step,
)
from danlu.positions import apply_rope, rope_frequencies

BACKENDS = {"reference": {"backend": "reference"}, "chunked": {"backend": "chunked", "chunk_size": 4}}
backends = pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS.keys())
causality = pytest.mark.parametrize("is_causal", [True, False])
INV_FREQ = rope_frequencies(6)
ROTATIONS = {"plain": {}, "rotated": {"inv_freq": INV_FREQ}, "unnormalized": {"normalize": False}}
rotations = pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS.keys())


def tensors(*, heads=4, key_heads=2, queries=9, keys=9, dim=6, value_dim=5, batch=2, dtype=torch.float64):
    """Positive features, and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, value_dim)]
    query, key, value = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype) for x in (query, key, value - 0.5)]


def by_pairs(query, key, value, *, is_causal=True, eps=0.0, normalize=True, inv_freq=None):
    """The definition, one pair of positions at a time."""
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    group, past = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        numerator, total = torch.zeros_like(out[b, h, i]), 0.0
        for j in range(past + i + 1 if is_causal else key.shape[2]):
            q, k, v = query[b, h, i], key[b, h // group, j], value[b, h // group, j]
            turned = k if inv_freq is None else apply_rope(k[None], torch.tensor([j - past - i]), inv_freq)[0]
            numerator = numerator + (q @ turned) * v
            total = total + q @ k
        out[b, h, i] = numerator / (total + eps) if normalize else numerator
    return out


@backends
@causality
@rotations
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 9), (1, 6)])
def test_against_the_definition_by_pairs(options, is_causal, rotation, queries, keys):
    inputs = tensors(queries=queries, keys=keys)
    out = linear_attention(*inputs, is_causal=is_causal, **rotation, **options)
    torch.testing.assert_close(out, by_pairs(*inputs, is_causal=is_causal, **rotation), rtol=0, atol=1e-14)
    eps = {"eps": 0.5} if rotation.get("normalize", True) else {}
    out = linear_attention(*inputs, is_causal=is_causal, **rotation, **options, **eps)
    torch.testing.assert_close(out, by_pairs(*inputs, is_causal=is_causal, **rotation, **eps), rtol=0, atol=1e-14)


def test_features_of_ones_give_the_mean_of_what_is_seen():
    value = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
    ones = torch.ones(1, 1, 3, 2)
    assert linear_attention(ones, ones, value).flatten().tolist() == [1, 1.5, 3]
    assert linear_attention(ones, ones, value, is_causal=False).flatten().tolist() == [3, 3, 3]


@causality
@rotations
def test_chunks_equal_the_dense_definition(is_causal, rotation):
    inputs = [x.requires_grad_() for x in tensors(queries=300, keys=300, heads=2, key_heads=1)]
    outs = [linear_attention(*inputs, is_causal=is_causal, **rotation, backend="reference")]
    for chunk in (1, 32, 128, 300) if is_causal else (128,):
        outs.append(linear_attention(*inputs, is_causal=is_causal, **rotation, backend="chunked", chunk_size=chunk))
    # Not divided, the sums are some hundred.
    size = 1.0 if rotation.get("normalize", True) else float(outs[0].detach().abs().max())
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    for out, grad in zip(outs[1:], grads[1:], strict=True):
        assert (out - outs[0]).abs().max() <= 4e-15 * size
        for mine, theirs in zip(grad, grads[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13 * size**2)


@backends
@causality
@rotations
def test_gradients(options, is_causal, rotation):
    inputs = [x.requires_grad_() for x in tensors(batch=1, heads=2, key_heads=1, queries=5, keys=6, value_dim=2)]
    mask = torch.tensor([[False, True, True, True, True, True]])
    attend = partial(linear_attention, is_causal=is_causal, key_padding_mask=mask, **rotation, **options)
    assert torch.autograd.gradcheck(attend, inputs)
    if options["backend"] == "reference" or not is_causal:
        assert torch.autograd.gradgradcheck(attend, inputs)


@backends
@rotations
def test_causal_output_ignores_the_future(options, rotation):
    query, key, value = tensors()
    out = linear_attention(query, key, value, **rotation, **options)
    key[:, :, 5:], value[:, :, 5:], query[:, :, 5:] = 7.0, 1e4, 3.0
    assert torch.equal(linear_attention(query, key, value, **rotation, **options)[:, :, :5], out[:, :, :5])


@causality
@pytest.mark.parametrize("mode", ["elu1", "exp", "favor"])
def test_modules_are_causal_and_see_all_otherwise(is_causal, mode):
    module = LinearAttention(FavorFeatures(6, 9).double() if mode == "favor" else mode, is_causal=is_causal)
    query, key, value = (x - 0.5 for x in tensors(queries=200, keys=200))
    changed = [x.clone() for x in (query, key, value)]
    changed[1][:, :, 150:] *= 5
    changed[2][:, :, 150:] *= 5
    change = (module(query, key, value) - module(*changed)).abs().amax((0, 1, 3))
    # Dividing keys by their common largest rounds differently, no more.
    assert change[:150].max() <= 1e-13 if is_causal else change[:150].min() > 1e-4
    assert change[150:].min() > 1e-4


def decoded(step, inputs, sizes):
    state, outs, place = None, [], 0
    for size in sizes:
        out, state = step(*(x[:, :, place : place + size] for x in inputs), state)
        outs.append(out)
        place += size
    assert int(state.length) == place
    return torch.cat(outs, dim=2), state


@rotations
@pytest.mark.parametrize("sizes", [[1] * 12, [12], [5, 1, 1, 5], [1, 11], [3, 4, 5]])
def test_decoding_equals_the_full_pass(rotation, sizes):
    inputs = tensors(queries=12, keys=12)
    step = partial(linear_attention_step, chunk_size=4, **rotation)
    out, state = decoded(step, inputs, sizes)
    torch.testing.assert_close(out, linear_attention(*inputs, **rotation), rtol=0, atol=1e-14)
    torch.testing.assert_close(state.key_sum, inputs[1].sum(2), rtol=0, atol=1e-14)
    _, whole = decoded(step, inputs, [12])
    for mine, theirs in zip(state, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)


FEATURES = {
    "elu1": lambda: "elu1",
    "exp": lambda: "exp",
    "favor": lambda: FavorFeatures(6, 20, generator=torch.Generator().manual_seed(1)).double(),
    "softvq": lambda: SoftVQFeatures(torch.linspace(-1, 1, 24).double().view(4, 6), sigma=0.5),
}


@pytest.mark.parametrize("rope_base", [None, 100.0])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("sizes", [[1] * 12, [4, 1, 7]])
def test_modules_decode_as_they_read(features, rope_base, sizes):
    """Keys that grow with every step: the largest feature is always that of the last token."""
    module = LinearAttention(FEATURES[features](), rope_base=rope_base, chunk_size=3)
    query, key, value = (x - 0.5 for x in tensors(queries=12, keys=12))
    key = key * torch.linspace(0.1, 8, 12).view(-1, 1)
    out, state = decoded(module.step, (query, key, value), sizes)
    torch.testing.assert_close(out, module(query, key, value), rtol=0, atol=2e-13)
    if features in ("exp", "favor"):
        torch.testing.assert_close(state.log_scale, module.features.key_features(key)[1], rtol=0, atol=1e-14)
    # Of padding between the tokens nothing is kept.
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    state, outs = None, []
    for t in range(12):
        one, state = module.step(*(x[:, :, t : t + 1] for x in (query, key, value)), state, mask[:, t : t + 1])
        outs.append(one)
    torch.testing.assert_close(torch.cat(outs, 2), module(query, key, value, mask), rtol=0, atol=2e-13)


def test_decoding_does_not_overflow_where_plain_exponentials_do():
    module = LinearAttention("exp")
    query, key, value = (x.float() for x in tensors(queries=6, keys=6))
    key = key + torch.tensor([0, 300, -500, 900, 0, 100.0]).view(-1, 1)
    out, _ = decoded(module.step, (query, key, value), [1] * 6)
    exact = module(*(x.double() for x in (query, key, value)))
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, :, 3:].double(), exact[:, :, 3:], rtol=1e-5, atol=1e-5)


def test_state_is_of_constant_size_and_left_as_it_was():
    inputs = tensors(queries=50, keys=50)
    _, state = linear_attention_step(*inputs)
    _, next_state = linear_attention_step(*inputs, state)
    assert [x.shape for x in state] == [x.shape for x in next_state]
    assert sum(x.numel() for x in state) == 2 * 2 * (6 * 5 + 6 + 1) + 1
    before = [x.clone() for x in state]
    linear_attention_step(*(x[:, :, :1] for x in inputs), state)
    assert all(torch.equal(one, other) for one, other in zip(before, state, strict=True))
    half = linear_attention_step(*(x.to(torch.bfloat16) for x in inputs))[1]
    assert half.key_value.dtype == torch.float32


def test_gradients_reach_the_first_part_of_a_text_read_in_parts():
    inputs = [x.requires_grad_() for x in tensors(queries=12, keys=12)]
    for rotation in ({}, {"inv_freq": INV_FREQ}):
        out, _ = decoded(partial(linear_attention_step, chunk_size=3, **rotation), inputs, [5, 6, 1])
        mine = torch.autograd.grad(out.square().sum(), inputs)
        theirs = torch.autograd.grad(linear_attention(*inputs, **rotation).square().sum(), inputs)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rotation_is_relative_and_leaves_the_denominators():
    query, key, value = tensors(queries=9, keys=9)
    interleaved = torch.cat((torch.arange(0, 6, 2), torch.arange(1, 6, 2)))
    out = linear_attention(query, key, value, inv_freq=INV_FREQ)
    # Halves and neighbors are the same up to a fixed order of the features.
    order = interleaved.argsort()
    neighbors = linear_attention(query[..., order], key[..., order], value, inv_freq=INV_FREQ, interleaved=True)
    torch.testing.assert_close(neighbors, out, rtol=0, atol=1e-14)
    # Features of 1 have products of F below, whatever the rotation: values of 1 show the numerator.
    ones = torch.ones(1, 1, 7, 6, dtype=torch.float64)
    turned = linear_attention(ones, ones, ones[..., :1], inv_freq=INV_FREQ)[0, 0, :, 0]
    positions = torch.arange(7, dtype=torch.float64)
    weights = torch.stack([(2 * torch.cos(INV_FREQ * t)).sum() / 6 for t in positions])
    torch.testing.assert_close(turned, weights.cumsum(0) / (positions + 1), rtol=0, atol=1e-14)
    # Fewer frequencies rotate the first features of each half alone.
    partial_rotation = linear_attention(query, key, value, inv_freq=INV_FREQ[:1])
    assert (partial_rotation - out).abs().max() > 1e-4


@backends
@causality
@pytest.mark.parametrize("normalize", [True, False])
def test_grouped_heads_equal_repeated_heads(options, is_causal, normalize):
    query, key, value = tensors()
    run = partial(linear_attention, is_causal=is_causal, normalize=normalize, **options)
    repeated = run(query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1))
    torch.testing.assert_close(run(query, key, value), repeated, rtol=1e-13, atol=1e-13)


MASKS = {
    "left": torch.tensor([[True] * 9, [False] * 4 + [True] * 5]),
    "right": torch.tensor([[True] * 9, [True] * 5 + [False] * 4]),
    "gaps": torch.tensor([[True] * 9, [True, False, True] * 3]),
    "one_empty": torch.tensor([[True] * 9, [False] * 9]),
}


@backends
@causality
@rotations
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_padding(options, is_causal, rotation, mask, dtype):
    """Of the other dtypes, too, in the contract of the family."""
    query, key, value = (x.requires_grad_() for x in tensors(dtype=dtype))
    run = partial(linear_attention, is_causal=is_causal, key_padding_mask=mask, **rotation, **options)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        out = run(query, key, value)
        out.float().square().sum().backward()
    hidden = ~mask
    assert (out.transpose(1, 2)[hidden] == 0).all()
    for x in (query, key, value):
        assert x.grad.isfinite().all()
        assert (x.grad.transpose(1, 2)[hidden] == 0).all()
    for filler in (1e4, -3.0, float("nan")):
        changed = [x.detach().clone() for x in (query, key, value)]
        for x in changed:
            x.transpose(1, 2)[hidden] = filler
        assert torch.equal(run(*changed), out)
    if mask[1].any() and "inv_freq" not in rotation:
        alone = [x.detach()[1:, :, mask[1]] for x in (query, key, value)]
        expected = linear_attention(*alone, is_causal=is_causal, **rotation, **options)
        tolerance = {torch.float64: 1e-14, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(out[1:, :, mask[1]], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@rotations
def test_half_precision_of_long_texts(dtype, rotation):
    """Sums over 4096 keys, which overflow float16 where the numerators are not divided yet."""
    inputs = tensors(queries=4096, keys=4096, heads=1, key_heads=1, batch=1, dtype=dtype)
    scale = 1e-3 if "normalize" in rotation else 30.0
    inputs[2] = inputs[2] * scale
    out = linear_attention(*inputs, **rotation)
    exact = linear_attention(*(x.double() for x in inputs), **rotation, backend="reference")
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@backends
@causality
@rotations
def test_autocast_changes_nothing(options, is_causal, rotation):
    """Sums of features are not for half precision, whose rounding errors add up over a text."""
    inputs = [x.requires_grad_() for x in tensors(queries=40, keys=40, dtype=torch.float32)]
    run = partial(linear_attention, is_causal=is_causal, **rotation, **options)
    expected = run(*inputs)
    step = linear_attention_step(*(x[:, :, :1] for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(*inputs)
        first = linear_attention_step(*(x[:, :, :1] for x in inputs))
    assert torch.equal(out, expected)
    assert torch.equal(first[0], step[0])
    assert torch.equal(first[1].key_value, step[1].key_value)
    grads = [torch.autograd.grad(x.sum(), inputs) for x in (out, expected)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    if options["backend"] == "chunked" and is_causal:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = torch.autograd.grad(run(*inputs).sum(), inputs)
        assert all(torch.equal(*pair) for pair in zip(again, grads[0], strict=True))


@backends
def test_compile_empty_and_strided(options):
    inputs = tensors()
    expected = linear_attention(*inputs, **options)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, **options), expected)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    torch.testing.assert_close(linear_attention(*strided, **options), expected, rtol=0, atol=1e-14)
    for is_causal in (True, False):
        empty = [x[:, :, :0].requires_grad_() for x in inputs]
        out = linear_attention(*empty, is_causal=is_causal, **options)
        assert out.shape == (2, 4, 0, 5)
        out.sum().backward()
        assert empty[0].grad.shape == (2, 4, 0, 6)


def test_a_step_compiles_once_for_all_lengths():
    inputs = tensors(queries=12, keys=12, dtype=torch.float32)
    module = LinearAttention("exp", rope_base=50.0)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module.step, fullgraph=True, backend=count)
    _, state = module.step(*(x[:, :, :1] for x in inputs))
    outs = []
    for t in range(1, 12):
        out, state = compiled(*(x[:, :, t : t + 1] for x in inputs), state)
        outs.append(out)
    assert count.frame_count == 1
    torch.testing.assert_close(torch.cat(outs, 2), module(*inputs)[:, :, 1:], rtol=1e-4, atol=1e-5)


@backends
@causality
@rotations
def test_packed_sequences_equal_those_alone(options, is_causal, rotation):
    """Also one of a single token, and one without any."""
    inputs = [x.requires_grad_() for x in tensors(batch=1, queries=17, keys=17)]
    borders = torch.tensor([0, 6, 6, 7, 17], dtype=torch.int32)
    out = linear_attention(*inputs, is_causal=is_causal, cu_seqlens=borders, **rotation, **options)
    for low, high in ((0, 6), (6, 7), (7, 17)):
        alone = linear_attention(*(x[:, :, low:high] for x in inputs), is_causal=is_causal, **rotation, **options)
        torch.testing.assert_close(out[:, :, low:high], alone, rtol=1e-13, atol=1e-13)
    # The first sequence has no part in the others.
    assert all((x[:, :, :6] == 0).all() for x in torch.autograd.grad(out[:, :, 6:].sum(), inputs))


def test_packed_sequences_of_modules():
    """As of the function; a hook sees one call, a compiler may break its graph, and no token at all is fine."""
    module = LinearAttention(FavorFeatures(6, 8).double(), rope_base=50.0, chunk_size=4)
    query, key, value = tensors(batch=1, queries=17, keys=17)
    borders = torch.tensor([0, 6, 17])
    seen = []
    module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    out = module(query, key, value, cu_seqlens=borders)
    assert seen == [(1, 4, 17, 5)]
    compiled = torch.compile(module, backend="eager")(query, key, value, cu_seqlens=borders)
    torch.testing.assert_close(compiled, out, rtol=0, atol=1e-14)
    alone = [module(*(x[:, :, rows] for x in (query, key, value))) for rows in (slice(0, 6), slice(6, 17))]
    torch.testing.assert_close(torch.cat(alone, 2), out, rtol=0, atol=1e-14)
    nothing = module(*(x[:, :, :0] for x in (query, key, value)), cu_seqlens=torch.tensor([0, 0]))
    assert nothing.shape == (1, 4, 0, 5)


def test_modules_divide_packed_sequences_by_their_own_largest_feature():
    module = LinearAttention("exp")
    query, key, value = (x.float() for x in tensors(batch=1, queries=9, keys=9))
    key = key + torch.cat((torch.zeros(5), torch.full((4,), 900.0)))[:, None]
    out = module(query, key, value, cu_seqlens=torch.tensor([0, 5, 9]))
    torch.testing.assert_close(out[:, :, :5], module(*(x[:, :, :5] for x in (query, key, value))))
    # The limit of reading at once: earlier keys that are e^900 times as small as a later one count as 0.
    assert (module(query, key, value)[:, :, :5] == 0).all()
    with pytest.raises(ValueError, match="cu_seqlens needs one sample"):
        module(*tensors(), cu_seqlens=torch.tensor([0, 9]))


def test_nan_of_visible_keys_is_not_hidden():
    query, key, value = tensors()
    key[0, 0, 3, 0] = float("nan")
    for options in BACKENDS.values():
        out = linear_attention(query, key, value, **options)
        assert out[0, :2, 3:].isnan().all()
        assert out[1].isfinite().all()
        assert out[0, 2:].isfinite().all()


def test_features_without_common_support_give_zero():
    query, key, value = tensors()
    query[..., :3], key[..., 3:] = 0, 0
    for options in BACKENDS.values():
        assert (linear_attention(query, key, value, **options) == 0).all()
        step, _ = linear_attention_step(*(x[:, :, :1] for x in (query, key, value)))
        assert (step == 0).all()


def test_negative_features():
    query, key, value = tensors()
    query[0, 0, 0, 0] = -0.25
    for call in (
        partial(linear_attention, backend="reference"),
        partial(linear_attention, backend="chunked"),
        partial(linear_attention, is_causal=False),
        linear_attention_step,
    ):
        with pytest.raises(ValueError, match=r"query must be features without negative values.*got -0\.25"):
            call(query, key, value)
        call(query, key, value, normalize=False)
    with pytest.raises(ValueError, match="key must be features"):
        linear_attention(*tensors()[:1], -key, value)
    # Compiled code does not wait for the values; the assertion speaks.
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="query must be features without negative values"):
        compiled(query, key, value)


class Squares(nn.Module):
    """A feature map of a user's own."""

    def query_features(self, query):
        return query.square()

    def key_features(self, key, key_padding_mask=None):
        return key.square(), None

    def forward(self, query, key, key_padding_mask=None):
        return query.square(), key.square()


def test_module_equals_function():
    query, key, value = (x - 0.5 for x in tensors())
    mask = MASKS["left"]
    for features in ("elu1", torch.square, Squares(), feature_map("relu")):
        module = LinearAttention(features, is_causal=False, eps=0.1, rope_base=100.0, chunk_size=4)
        pair = module.features(query, key, mask)
        expected = linear_attention(
            *pair, value, is_causal=False, eps=0.1, inv_freq=rope_frequencies(6, base=100.0), key_padding_mask=mask
        )
        assert torch.equal(module(query, key, value, mask), expected)
    assert "is_causal=False, chunk_size=4, eps=0.1, normalize=True, rope_base=100.0, backend='auto'" in repr(module)
    assert LinearAttention("elu1").state_dict() == {}
    assert list(LinearAttention(FavorFeatures(6, 8)).state_dict()) == ["features.projection"]


def test_unit_vectors_have_cosines_for_weights():
    query, key, value = (x - 0.5 for x in tensors(key_heads=4))
    cosines = F.cosine_similarity(query[..., None, :], key[..., None, :, :], dim=-1)
    module = LinearAttention(partial(F.normalize, dim=-1), normalize=False, chunk_size=4)
    torch.testing.assert_close(module(query, key, value), cosines.tril() @ value, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": torch.ones(2, 3, 9, 6)}, ValueError, r"number of key heads, got query \(2, 3, 9, 6\)"),
        ({"query": torch.ones(2, 4, 9, 8)}, ValueError, "same head_dim"),
        ({"query": torch.ones(2, 4, 10, 6)}, ValueError, "cannot be more of them"),
        ({"query": torch.ones(4, 9, 6)}, ValueError, r"query must have shape \(B, H, L, D\)"),
        ({"value": torch.ones(2, 2, 9, 5).double()}, TypeError, "one dtype"),
        ({"value": torch.ones(2, 2, 9, 5).long()}, TypeError, "value must be a floating-point tensor"),
        ({"key_padding_mask": torch.ones(2, 9)}, TypeError, "key_padding_mask must be a bool tensor"),
        ({"key_padding_mask": torch.ones(2, 8).bool()}, ValueError, r"must have shape \(B, N\) = \(2, 9\)"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "cu_seqlens needs one sample"),
        ({"cu_seqlens": torch.tensor([0.0, 9])}, TypeError, "cu_seqlens must be an int32 or int64 tensor"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int"),
        ({"eps": -1.0}, ValueError, r"eps must be in \[0, inf\)"),
        ({"eps": 0.1, "normalize": False}, ValueError, "eps belongs to the denominators"),
        ({"inv_freq": torch.ones(4)}, ValueError, "R at most 6"),
        ({"inv_freq": torch.ones(2).long()}, TypeError, "inv_freq must be a floating-point tensor"),
        ({"interleaved": True}, ValueError, "it needs inv_freq"),
        ({"backend": "flash"}, ValueError, "backend must be one of 'auto', 'chunked', 'reference', got 'flash'"),
        ({"scale": 1.0}, TypeError, "scale"),
    ],
)
def test_bad_input(change, error, match):
    query, key, value = tensors(dtype=torch.float32)
    with pytest.raises(error, match=match):
        linear_attention(**{"query": query, "key": key, "value": value, **change})


@pytest.mark.parametrize(
    ("borders", "mask", "rows", "match"),
    [
        ([0, 4], None, 9, r"cu_seqlens must rise from 0 to the number of slots, 9, got \[0, 4\]"),
        ([1, 9], None, 9, "must rise from 0"),
        ([0, 5, 3, 9], None, 9, "must rise from 0"),
        ([0], None, 9, r"must have shape \(sequences \+ 1,\), got \(1,\)"),
        ([0, 9], torch.ones(1, 9, dtype=torch.bool), 9, "no key_padding_mask"),
        ([0, 9], None, 4, "as many queries as keys"),
    ],
)
def test_bad_borders(borders, mask, rows, match):
    query, key, value = tensors(batch=1)
    for call in (linear_attention, LinearAttention()):
        with pytest.raises(ValueError, match=match):
            call(query[:, :, -rows:], key, value, cu_seqlens=torch.tensor(borders), key_padding_mask=mask)


def test_bad_steps_and_modules():
    query, key, value = tensors()
    _, state = linear_attention_step(query, key, value)
    with pytest.raises(ValueError, match="a step has as many keys as queries"):
        linear_attention_step(query[:, :, :1], key, value)
    with pytest.raises(ValueError, match=r"state.key_value must have shape \(2, 2, 6, 5\).*got \(2, 2, 6, 4\)"):
        linear_attention_step(query, key, value, state._replace(key_value=state.key_value[..., :4]))
    with pytest.raises(ValueError, match=r"key_log_scale must have shape \(2, 2, 1, 1\), got \(2, 2\)"):
        linear_attention_step(query, key, value, state, key_log_scale=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="a step needs is_causal=True"):
        LinearAttention(is_causal=False).step(query, key, value)
    with pytest.raises(ValueError, match="stabilize=True divide out"):
        LinearAttention("exp", normalize=False)
    with pytest.raises(ValueError, match="kind must be one of"):
        LinearAttention("softmax")
    with pytest.raises(ValueError, match="eps belongs"):
        LinearAttention(eps=0.1, normalize=False)
    with pytest.raises(ValueError, match="backend must be one of"):
        LinearAttention(backend="triton")
    assert isinstance(state, LinearAttentionState)
