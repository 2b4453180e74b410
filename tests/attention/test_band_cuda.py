"""The path through CUDA's flash kernels, on an emulation of their operators; and when it is taken."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from danlu.attention import _band_cuda, _bands, explain_backend, rerope_attention
from danlu.attention._band_calls import Call, band_calls
from danlu.attention._band_kernels import kernel_of

# Keys, queries, window, slope, causal.
CASES = [
    (37, 37, 8, 0.0, True),
    (37, 37, 8, 0.25, False),
    (64, 64, 1, 0.0, True),
    (50, 50, 64, 0.0, True),
    (50, 50, 64, 0.0, False),
    (96, 96, 32, 16.0, True),
    (200, 50, 70, 0.3, True),
    (200, 50, 160, 0.0, False),
    (200, 140, 70, 0.0, True),
    (130, 1, 64, 0.0, True),
]


def dense(query, key, value, is_causal, scale, left, right):
    """Output and log-sum-exp in the operator's layout; rows and keys end together."""
    group = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    rows, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys)[keys - rows :, None] - torch.arange(keys)
    visible = torch.ones(rows, keys, dtype=torch.bool) if left < 0 else distance <= left
    if is_causal or right >= 0:
        visible = visible & (distance >= -(0 if is_causal else right))
    scores = (query @ key.transpose(-2, -1) * scale).masked_fill(~visible, -torch.inf)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2), scores.logsumexp(-1), scores


def emulated_forward(*given, scale, window_size_left, window_size_right):
    query, key, value, *borders, rows, keys, dropout, is_causal, debug = given
    assert (borders, rows, keys) == ([None, None], query.shape[1], key.shape[1])
    assert (dropout, debug) == (0.0, False)
    assert query.shape[-1] % 8 == 0
    out, total, _ = dense(query, key, value, is_causal, scale, window_size_left, window_size_right)
    return out, total, None, None, None


def emulated_backward(*given, scale, window_size_left, window_size_right):
    """What a flash backward does: weights from the given log-sum-exp, whatever row it is of."""
    upstream, query, key, value, out, total, _, _, _, _, dropout, is_causal, state, _ = given
    assert dropout == 0.0
    assert state.shape == (2,)
    assert total.is_contiguous()
    assert all(x.stride(-1) == 1 for x in given[:5])
    _, _, scores = dense(query, key, value, is_causal, scale, window_size_left, window_size_right)
    group = query.shape[2] // key.shape[2]
    upstream, query, key, value, out = (x.transpose(1, 2) for x in (upstream, query, key, value, out))
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    weights = (scores - total[..., None]).exp()
    inner = (upstream @ value.transpose(-2, -1) - (upstream * out).sum(-1, keepdim=True)) * weights * scale
    grads = inner @ key, inner.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ upstream
    shared = [grads[0], *(x.unflatten(1, (-1, group)).sum(2) for x in grads[1:])]
    return tuple(x.transpose(1, 2) for x in shared)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setitem(_band_cuda._OPERATORS, "forward", emulated_forward)
    monkeypatch.setitem(_band_cuda._OPERATORS, "backward", emulated_backward)
    monkeypatch.setattr(_bands, "kernel_of", lambda query, value: "cuda")


def both(options, *, keys, queries, dim=16, value_dim=16):
    generator = torch.Generator().manual_seed(keys)
    shapes = (2, 4, queries, dim), (2, 2, keys, dim), (2, 2, keys, value_dim)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    results = []
    for backend in ("banded", "reference"):
        out = rerope_attention(*inputs, backend=backend, **options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("keys", "queries", "window", "slope", "is_causal"), CASES)
def test_equals_the_definition(keys, queries, window, slope, is_causal):
    both({"window": window, "slope": slope, "is_causal": is_causal}, keys=keys, queries=queries)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("value_dim", [5, 12, 20])
def test_channels_are_filled_up_to_eight(value_dim):
    both({"window": 8}, keys=40, queries=40, dim=12, value_dim=value_dim)


@pytest.mark.usefixtures("emulated")
def test_padding_masks_and_packed_sequences():
    """Spans of visible keys are calls of the kernel; what it cannot mask is plain PyTorch."""
    slots = torch.arange(40)
    for options in (
        {"key_padding_mask": slots >= torch.tensor([[0], [9]])},
        {"key_padding_mask": (slots % 7 != 3).expand(2, -1)},
        {"attn_mask": torch.randn(40, 40, dtype=torch.float64)},
    ):
        both({"window": 8, **options}, keys=40, queries=40)


def test_one_call_per_band():
    calls = list(band_calls(300, 300, 100, True, windows=True))
    assert calls == [
        Call("left", slice(100, 300), slice(0, 200), "causal"),
        Call("near", slice(0, 300), slice(0, 300), "window"),
    ]
    *_, near = band_calls(50, 300, 20, True, windows=True)
    assert near == Call("near", slice(0, 50), slice(231, 300), "window")


def test_the_operators_of_this_version_are_known():
    """A version of PyTorch with other arguments shows here, and runs in plain PyTorch."""
    assert None not in _band_cuda._OPERATORS.values()
    assert _band_cuda._resolved("_flash_attention_forward", _band_cuda._FORWARD[:-1], 5) is None
    assert _band_cuda._resolved("_flash_attention_forward", _band_cuda._FORWARD, 4) is None
    assert _band_cuda._resolved("_no_such_attention", _band_cuda._FORWARD, 5) is None


def test_a_compiler_takes_the_answer_as_constant():
    def function():
        return None

    marks = vars(torch.compiler.assume_constant_result(function))
    assert marks
    assert marks.items() <= vars(_band_cuda._of_device).items()


@pytest.mark.parametrize("shape", ["full", "causal", "mirrored", "window"])
def test_arguments_fit_the_operators(shape):
    """Under fake tensors the operators check their arguments and give shapes."""
    call = Call("near", slice(0, 40), slice(0, 40), shape)
    with FakeTensorMode():
        query, key, value = (torch.empty(2, h, 40, 16, dtype=torch.bfloat16, device="meta") for h in (4, 2, 2))
        out, total = _band_cuda.forward(call, query, key, value, 0.25, 8, True)
        assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)
        assert (total.shape, total.dtype) == (query.shape[:3], torch.float32)
        grads = _band_cuda.backward(call, [out, out, total], query, key, value, 0.25, 8, True)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


@pytest.fixture
def device(monkeypatch):
    """A device that can run the kernels."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(_band_cuda, "_agrees", lambda device: True)


def fake(dtype=torch.bfloat16, *, length=300, dim=16):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [torch.empty(1, 2, length, dim, dtype=dtype, device="cuda") for _ in range(3)]


@pytest.mark.usefixtures("device")
def test_what_runs_and_why():
    assert kernel_of(*fake()[1:]) == "cuda"
    assert explain_backend(*fake()) == ("banded", "flash kernels on bands of near and far keys, in 1 parts")
    masked = explain_backend(*fake(), attn_mask=fake(torch.float32, length=1, dim=1)[0])
    assert masked.reason == "plain PyTorch on tiles of rows, because there is an attn_mask"
    for tensors, why in (
        (fake(torch.float32), "it is for bfloat16 and float16"),
        (fake(dim=264), "it is for heads of at most 256 channels"),
    ):
        assert kernel_of(*tensors[1:]) == "portable"
        found = explain_backend(*tensors, backend="banded")
        assert found.reason.endswith(f"tiles in plain PyTorch; of the kernel for CUDA: {why}")


def test_old_devices_and_builds(monkeypatch, device):
    tensors = fake()[1:]
    monkeypatch.setattr(_band_cuda, "_agrees", lambda device: False)
    assert _band_cuda.why_not(*tensors) == "its results on this device differ from plain PyTorch's"
    monkeypatch.setattr(_band_cuda, "_agrees", lambda device: torch.zeros(2) @ torch.zeros(3))
    assert _band_cuda.why_not(*tensors).startswith("it fails on this device: ")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    assert _band_cuda.why_not(*tensors) == "it needs compute capability 8.0, and the device has 7.5"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert _band_cuda.why_not(*tensors) == "this build of PyTorch has none"
    monkeypatch.setitem(_band_cuda._OPERATORS, "backward", None)
    assert "are others than expected" in _band_cuda.why_not(*tensors)


def in_float(operator):
    """The emulation for half tensors."""

    def run(*given, **options):
        given = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
        return operator(*given, **options)

    return run


def top_left(*given, window_size_left, window_size_right, **options):
    """As if rows and keys began together."""
    query, key, *rest = given
    shift = key.shape[1] - query.shape[1]
    if window_size_left >= 0:
        window_size_left += shift
    return emulated_forward(query, key, *rest, window_size_left=window_size_left, window_size_right=0, **options)


def own_total(*given, **options):
    """A backward that knows only log-sum-exps of its own."""
    return emulated_backward(*given[:5], given[5] - 1, *given[6:], **options)


@pytest.mark.parametrize(
    ("forward", "backward", "agrees"),
    [
        (emulated_forward, emulated_backward, True),
        (top_left, emulated_backward, False),
        (
            lambda *x, **y: (emulated_forward(*x, **y)[0], emulated_forward(*x, **y)[1] / 0.693),
            emulated_backward,
            False,
        ),
        (emulated_forward, own_total, False),
    ],
    ids=["right", "aligned at the beginning", "in units of log 2", "of its own log-sum-exp"],
)
def test_what_the_bands_rely_on_is_looked_at_once(monkeypatch, forward, backward, agrees):
    state = torch.get_rng_state()
    monkeypatch.setitem(_band_cuda._OPERATORS, "forward", in_float(forward))
    monkeypatch.setitem(_band_cuda._OPERATORS, "backward", in_float(backward))
    assert _band_cuda._agrees.__wrapped__(torch.device("cpu")) is agrees
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "queries", "window", "slope", "is_causal"), CASES)
def test_on_a_device(keys, queries, window, slope, is_causal):
    generator = torch.Generator().manual_seed(keys)
    shapes = (2, 4, queries, 64), (2, 2, keys, 64), (2, 2, keys, 64)
    drawn = [torch.randn(s, generator=generator).to(torch.bfloat16) for s in shapes]
    results = []
    for dtype, backend in ((torch.bfloat16, "banded"), (torch.float64, "reference")):
        inputs = [x.to(device="cuda", dtype=dtype).requires_grad_() for x in drawn]
        out = rerope_attention(*inputs, window=window, slope=slope, is_causal=is_causal, backend=backend)
        results.append([out.double(), *(x.double() for x in torch.autograd.grad(out.sum(), inputs))])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() < 2e-2 * max(1.0, float(expected.abs().max()))
