"""The layer: its definition, decoding with a state of constant size, padding, training, precision."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from danlu.attention import VQAttention, VQState, vq_attention
from danlu.positions import rope_frequencies


def layer(width=16, heads=4, codes=5, *, block=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = VQAttention(width, heads, codes, block_size=block, **options)
    if module.relative_bias is not None:
        torch.nn.init.normal_(module.relative_bias)
    return module.to(dtype)


def hidden(batch=2, length=37, width=16, dtype=torch.float64):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


variants = pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_heads": 2, "window": 4},
        {"relative_bias": False, "num_key_heads": 1},
        {"relative_bias": False, "window": 3, "rope_base": 100.0},
    ],
)


@variants
@pytest.mark.parametrize("is_causal", [True, False])
def test_definition(options, is_causal):
    if not is_causal:
        options = {name: value for name, value in options.items() if name != "window"}
    module, x = layer(is_causal=is_causal, **options), hidden()
    out, quantized = module(x)
    key_heads = options.get("num_key_heads", 4)
    query, key, value = (
        (x @ part.weight.T).view(2, 37, -1, 4).transpose(1, 2) for part in (module.query, module.key, module.value)
    )
    query, key = (F.layer_norm(part, (4,)) / 4**0.25 for part in (query, key))
    assert key.shape[1] == key_heads
    torch.testing.assert_close(key.square().sum(-1), torch.full(key.shape[:3], 2.0, dtype=x.dtype), rtol=1e-2, atol=0)
    attended = vq_attention(
        query,
        key,
        value,
        module.quantizer.codebook,
        block_size=4,
        is_causal=is_causal,
        bias=module.relative_bias,
        window=options.get("window"),
        inv_freq=rope_frequencies(4, base=options.get("rope_base", 10000.0)) if "window" in options else None,
        scale=1.0,
        backend="reference",
    )
    expected = attended.transpose(1, 2).flatten(2) @ module.out.weight.T
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    distances = (key - quantized.key).square().sum((1, 3)).mean()
    torch.testing.assert_close(quantized.loss, 1e-4 * distances, rtol=1e-12, atol=0)


@variants
@pytest.mark.parametrize("start", [0, 1, 3, 7, 8, 9, 20, 36])
def test_decoding_equals_the_full_pass(options, start):
    module, x = layer(**options).eval(), hidden()
    full, _ = module(x)
    parts, state = module.prefill(x[:, :start])
    parts = [parts]
    for t in range(start, 37):
        out, state = module.step(x[:, t : t + 1], state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-12)
    # The state is that of a prefill of everything.
    whole = module.prefill(x)[1]
    for field in dataclasses.fields(VQState):
        mine, theirs = getattr(state, field.name), getattr(whole, field.name)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole.counts.sum(-1), torch.full(whole.counts.shape[:2], 29.0, dtype=x.dtype))


def test_decoding_samples_of_different_lengths():
    """Prompts padded on the left; one sample ends early and is fed padding."""
    module, x = layer(num_key_heads=2, window=5).eval(), hidden(length=40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :6] = False
    mask[0, 30:] = False
    x[~mask] = torch.nan
    full, _ = module(x, mask)
    assert (full[~mask] == 0).all()
    out, state = module.prefill(x[:, :20], mask[:, :20])
    parts = [out]
    for t in range(20, 40):
        out, state = module.step(x[:, t : t + 1], state, mask[:, t])
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-12)
    assert state.length.tolist() == [30, 34]
    alone, _ = module(x[1:, 6:])
    torch.testing.assert_close(full[1:, 6:], alone, rtol=0, atol=1e-12)
    # Beam search takes samples of the state.
    beams = state.select(torch.tensor([1, 1, 0]))
    step = module.step(hidden(length=1)[[1, 1, 0]], beams)[0]
    assert torch.equal(step[0], step[1])
    torch.testing.assert_close(step[[2, 0]], module.step(hidden(length=1), state)[0], rtol=0, atol=1e-14)


def test_the_state_has_a_constant_size():
    module = layer(dtype=torch.float32).eval()

    def size(state):
        return sum(x.numel() * x.element_size() for x in dataclasses.asdict(state).values())

    short, long = (module.prefill(hidden(length=n, dtype=torch.float32))[1] for n in (3, 500))
    assert size(short) == size(long)
    for _ in range(3):
        _, long = module.step(hidden(length=1, dtype=torch.float32), long)
    assert size(short) == size(long)


@pytest.mark.parametrize("start", [0, 17])
def test_a_sample_without_tokens(start):
    module, x = layer().eval(), hidden(length=17)
    mask = torch.tensor([[True], [False]]).expand(2, start)
    out, state = module.prefill(x[:, :start], mask)
    assert (out[1] == 0).all()
    out, state = module.step(x[:, :1], state, torch.tensor([True, False]))
    assert (out[1] == 0).all()
    assert state.length.tolist() == [start + 1, 0]
    first, state = module.step(x[:, :1], state)
    torch.testing.assert_close(first[1:], module(x[1:, :1])[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding(is_causal):
    module, x = layer(is_causal=is_causal), hidden(length=20)
    mask = torch.tensor([[True] * 20, [False] * 7 + [True] * 13])
    results = []
    for filler in (0.0, 1e4, float("nan")):
        copied, given = copy.deepcopy(module), x.clone()
        given[~mask] = filler
        out, quantized = copied(given, mask)
        assert (out[~mask] == 0).all()
        results.append((out, quantized.loss, *copied.quantizer.buffers()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone, _ = module(x[1:, 7:])
    torch.testing.assert_close(results[0][0][1:, 7:], alone, rtol=0, atol=1e-12)


def test_packed_sequences():
    """Outputs are those of the sequences alone, and the quantizer learns from all of them as from one batch."""
    module, x = layer(window=4, decay=0.5), hidden(batch=1)
    copied = copy.deepcopy(module)
    out, quantized = module(x, cu_seqlens=torch.tensor([0, 12, 37]))
    for first, last in ((0, 12), (12, 37)):
        alone = copy.deepcopy(copied).eval()(x[:, first:last])[0]
        torch.testing.assert_close(out[:, first:last], alone, rtol=0, atol=1e-12)
    whole = copied(x)[1]
    assert torch.equal(quantized.codes, whole.codes)
    assert torch.equal(quantized.loss, whole.loss)
    assert torch.equal(module.quantizer.batch_sums, copied.quantizer.batch_sums)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        module(x, cu_seqlens=torch.tensor([0, 36]))


def test_causality_and_gradients_of_all_parameters():
    module, x = layer(), hidden().requires_grad_()
    out, quantized = module(x)
    (grad,) = torch.autograd.grad(out[:, 15].sum(), x, retain_graph=True)
    assert (grad[:, 16:] == 0).all()
    assert (grad[:, 8:16] != 0).all()
    (out.square().sum() + quantized.loss).backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in module.parameters())


def test_training_learns_the_codebook():
    module = layer(decay=0.5, commitment=0.1, dtype=torch.float32)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    x = hidden(dtype=torch.float32)
    errors, losses = [], []
    for _ in range(30):
        out, quantized = module(x)
        loss = (out - x.flip(-1)).square().mean() + quantized.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(quantized.relative_error))
        losses.append(float(loss.detach()))
    assert errors[-1] < 0.8 * errors[0]
    assert losses[-1] < losses[0]
    before = copy.deepcopy(module.state_dict())
    module.eval()(x)
    module.step(x[:, :1], module.prefill(x)[1])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    fresh = VQAttention(16, 4, 5, block_size=4)
    fresh.load_state_dict(before)
    torch.testing.assert_close(fresh.eval()(x)[0], module(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    module, x = layer(dtype=torch.float32).eval(), hidden(dtype=torch.float32)
    exact = module(x)[0]
    with torch.autocast("cpu", dtype=dtype):
        mixed = module(x)[0]
        step = module.step(x[:, -1:], module.prefill(x[:, :-1])[1])[0]
    assert mixed.dtype == dtype
    # A rounded key may be nearest to another codeword, so outputs agree in the mean.
    assert (mixed.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    torch.testing.assert_close(step, mixed[:, -1:], rtol=3e-2, atol=3e-2)
    half = copy.deepcopy(module).to(dtype)
    assert half.quantizer.ema_sums.dtype == torch.float32
    assert half(x.to(dtype))[0].dtype == dtype


def test_compiles_whole():
    module, x = layer(dtype=torch.float32, reseed_below=0.5), hidden(dtype=torch.float32).requires_grad_()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        pair = [run(x) for run in (compiled, eager)]
        torch.testing.assert_close(pair[0][0], pair[1][0])
        grads = [torch.autograd.grad(out.square().sum() + found.loss, x)[0] for out, found in pair]
        torch.testing.assert_close(*grads)
    for mine, theirs in zip(module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"width": 15}, ValueError, "width must be a multiple of num_heads = 4, got 15"),
        ({"num_key_heads": 3}, ValueError, "num_heads must be a multiple of num_key_heads = 3, got 4"),
        ({"num_codes": 0}, ValueError, "num_codes must be at least 1"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
        ({"backend": "flash"}, ValueError, "backend must be one of"),
        ({"decay": 2.0}, ValueError, "decay must be in"),
        ({"block_size": 8, "window": 10}, ValueError, r"window must be at most block_size \+ 1 = 9"),
        ({"window": 4, "is_causal": False}, ValueError, "window needs is_causal=True"),
        ({"width": 12, "window": 4}, ValueError, "window needs an even head size, got 12 / 4 = 3"),
        ({"rope_base": 0.0}, ValueError, "rope_base must be in"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        VQAttention(**{"width": 16, "num_heads": 4, "num_codes": 5, **options})


def test_bad_input():
    module = layer()
    with pytest.raises(ValueError, match=r"hidden must have shape \(B, N, 16\), got \(2, 37, 8\)"):
        module(hidden(width=8))
    with pytest.raises(TypeError, match="hidden must be a floating-point tensor"):
        module(torch.zeros(2, 3, 16).long())
    with pytest.raises(TypeError, match="key_padding_mask must be a bool tensor"):
        module(hidden(), torch.ones(2, 37))
    with pytest.raises(TypeError, match="key_padding_mask must be a bool tensor"):
        module.prefill(hidden(), torch.ones(2, 37))
    state = module.prefill(hidden())[1]
    with pytest.raises(ValueError, match=r"hidden must have shape \(2, 1, C\), got \(2, 3, 16\)"):
        module.step(hidden(length=3), state)
    with pytest.raises(ValueError, match=r"visible must be bool of shape \(B,\), got torch.bool \(3,\)"):
        module.step(hidden(length=1), state, torch.ones(3).bool())
    with pytest.raises(ValueError, match="decoding needs is_causal=True"):
        layer(is_causal=False).prefill(hidden())
    assert "num_heads=4, num_key_heads=4, block_size=4, window=None, is_causal=True, backend='auto'" in repr(module)
