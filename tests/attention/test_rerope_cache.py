"""Steps with the cache equal the full call, whatever their sizes and the padding."""

import pytest
import torch

from danlu.attention import ReRoPECache, rerope_attention

LENGTH = 40


def tensors(batch=3, *, heads=4, key_heads=2, dim=8, value_dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, LENGTH, dim), (batch, key_heads, LENGTH, dim), (batch, key_heads, LENGTH, value_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def stepped(cache, inputs, sizes, visible=None):
    outs, low = [], 0
    for size in sizes:
        part = slice(low, low + size)
        mask = None if visible is None else visible[:, part]
        outs.append(cache.step(*(x[:, :, part] for x in inputs), mask))
        low += size
    return torch.cat(outs, 2)


VARIANTS = {
    "rerope": {},
    "leaky": {"slope": 0.3},
    "leaky, cached": {"slope": 0.3, "cache_leaky": True},
    "log n": {"logn": "post", "train_length": 6},
    "static": {"capacity": 50},
    "static, leaky": {"capacity": LENGTH, "slope": 0.3, "cache_leaky": True, "interleaved": True, "scale": 0.2},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def full(inputs, variant, **masks):
    options = {k: v for k, v in VARIANTS[variant].items() if k not in ("capacity", "cache_leaky")}
    return rerope_attention(*inputs, window=5, **options, **masks)


@variants
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [LENGTH], [30] + [1] * 10, [7, 1, 9, 1, 1, 21], [2] * 20])
def test_steps_of_any_size_equal_the_full_call(variant, sizes):
    inputs = tensors()
    out = stepped(ReRoPECache(5, **VARIANTS[variant]), inputs, sizes)
    torch.testing.assert_close(out, full(inputs, variant), rtol=0, atol=1e-12)


@variants
@pytest.mark.parametrize("sizes", [[30] + [1] * 10, [3, 1, 20, 1, 1, 14], [1] * LENGTH])
def test_left_padding(variant, sizes):
    inputs = tensors()
    visible = torch.arange(LENGTH) >= torch.tensor([[0], [6], [22]])
    for x in inputs[1:]:
        x.transpose(1, 2)[~visible] = torch.nan
    out = stepped(ReRoPECache(5, **VARIANTS[variant]), inputs, sizes, visible)
    torch.testing.assert_close(out, full(inputs, variant, key_padding_mask=visible), rtol=0, atol=1e-12)


@variants
@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 5]])
def test_right_padding_goes_on_where_the_sample_ends(variant, chunks):
    """Prompts of 5, 12 and 20 tokens, padded on the right to 20, and 10 tokens more, equal each sample alone."""
    inputs, prompts = tensors(), [5, 12, 20]
    cache = ReRoPECache(5, **VARIANTS[variant])
    visible = torch.arange(20) < torch.tensor(prompts)[:, None]
    first = cache.step(*(x[:, :, :20] for x in inputs), visible)
    assert cache.lengths.tolist() == prompts
    rest = stepped(cache, [x[:, :, 20:30] for x in inputs], chunks)
    assert cache.lengths.tolist() == [15, 22, 30]
    for i, prompt in enumerate(prompts):
        alone = [torch.cat((x[i : i + 1, :, :prompt], x[i : i + 1, :, 20:30]), 2) for x in inputs]
        expected = full(alone, variant)
        torch.testing.assert_close(first[i : i + 1, :, :prompt], expected[:, :, :prompt], rtol=0, atol=1e-12)
        assert torch.equal(first[i, :, prompt:], torch.zeros_like(first[i, :, prompt:]))
        torch.testing.assert_close(rest[i : i + 1], expected[:, :, prompt:], rtol=0, atol=1e-12)


def test_a_finished_sample_takes_no_slot():
    inputs = tensors()
    cache = ReRoPECache(5)
    stepped(cache, [x[:, :, :10] for x in inputs], [10])
    done = torch.tensor([[True], [False], [True]])
    out = cache.step(*(x[:, :, 10:11] for x in inputs), done)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert cache.lengths.tolist() == [11, 10, 11]
    out = cache.step(*(x[:, :, 11:12] for x in inputs))
    kept = torch.cat((torch.arange(10), torch.tensor([11])))
    expected = full([x[1:2, :, kept] for x in inputs], "rerope")
    torch.testing.assert_close(out[1:2], expected[:, :, -1:], rtol=0, atol=1e-12)


def test_reorder_and_crop():
    inputs = tensors()
    for ragged in (False, True):
        cache = ReRoPECache(5, slope=0.3, cache_leaky=True)
        visible = torch.arange(20) < torch.tensor([[20], [18], [15]]) if ragged else None
        cache.step(*(x[:, :, :20] for x in inputs), visible)
        order = torch.tensor([2, 2, 0])
        cache.reorder(order)
        cache.crop(14)
        out = cache.step(*(x[order, :, 20:21] for x in inputs))
        kept = torch.cat((torch.arange(14), torch.tensor([20])))
        expected = full([x[order][:, :, kept] for x in inputs], "leaky")
        torch.testing.assert_close(out, expected[:, :, -1:], rtol=0, atol=1e-12)
        assert out.shape == (3, 4, 1, 6)


def test_memory_is_that_of_the_keys_and_values():
    cache = ReRoPECache(5, capacity=50)
    inputs = tensors()
    cache.step(*(x[:, :, :3] for x in inputs))
    held = [x.data_ptr() for x in cache._tensors]
    assert [tuple(x.shape) for x in cache._tensors] == [(3, 2, 50, 8), (3, 2, 50, 6)]
    cache.step(*(x[:, :, 3:] for x in inputs))
    assert [x.data_ptr() for x in cache._tensors] == held
    growing = ReRoPECache(5)
    for _ in range(65):
        growing.step(*(x[:, :, :1] for x in inputs))
    assert growing._tensors[0].shape[2] == 128
    assert growing.lengths == 65
    assert "lengths=65" in repr(growing)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precision(dtype, limit):
    inputs = tensors(dtype=dtype)
    visible = torch.arange(LENGTH) >= torch.tensor([[0], [6], [22]])
    out = stepped(ReRoPECache(5), inputs, [30] + [1] * 10, visible)
    assert out.dtype == dtype
    expected = full([x.double() for x in inputs], "rerope", key_padding_mask=visible)
    assert (out.double() - expected).abs().max() <= limit


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"slope": -0.1}, ValueError, "slope must be in"),
        ({"cache_leaky": True}, ValueError, "cache_leaky is of use with slope > 0 only"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1"),
        ({"logn": "post"}, ValueError, "needs train_length"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        ReRoPECache(**{"window": 5, **options})


def test_bad_steps():
    query, key, value = tensors()
    cache = ReRoPECache(5, capacity=41)
    cache.step(query, key, value)
    with pytest.raises(ValueError, match="capacity of 41 tokens, got 80"):
        cache.step(query, key, value)
    with pytest.raises(ValueError, match="holds 3 samples, got 2"):
        cache.step(*(x[:2, :, :1] for x in (query, key, value)))
    with pytest.raises(ValueError, match="every new token has a query and a key"):
        cache.step(query[:, :, :2], key, value)
    with pytest.raises(ValueError, match="R at most 8"):
        ReRoPECache(5, inv_freq=torch.ones(5)).step(query, key, value)
    assert cache.step(*(x[:, :, :0] for x in (query, key, value))).shape == (3, 4, 0, 6)
    assert cache.lengths == 40
