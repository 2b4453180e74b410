"""What runs, and the reason that is given."""

import pytest
import torch

from danlu.attention import explain_backend, rope_attention
from danlu.attention._rerope_backend import in_bands


def tensors(length, batch=1, heads=1, device="cpu"):
    return [torch.zeros(batch, heads, length, 4, device=device) for _ in range(3)]


def test_reasons():
    small, large = tensors(16), tensors(300)
    gaps = torch.arange(300)[None] != 5
    assert explain_backend(*small) == ("reference", "its 16 x 16 scores are few")
    assert explain_backend(*large, backend="reference") == ("reference", "it was asked for")
    assert explain_backend(*large) == ("banded", "flash kernels on bands of near and far keys, in 1 parts")
    assert explain_backend(*small, backend="banded").backend == "banded"
    packed = explain_backend(*large, cu_seqlens=torch.tensor([0, 100, 300]))
    assert packed.reason.endswith("in 2 parts")
    assert explain_backend(*large, key_padding_mask=gaps).reason.endswith(
        "because the visible keys of a sample have gaps"
    )
    assert explain_backend(*large, attn_mask=gaps).reason.endswith("because there is an attn_mask")
    with pytest.raises(ValueError, match="backend must be one of"):
        explain_backend(*small, backend="flash")
    with pytest.raises(ValueError, match="same head_dim"):
        explain_backend(small[0][..., :2], *small[1:])


def test_other_devices_bound_the_memory():
    """The meta device stands for any device without a flash kernel that gives log-sum-exps."""
    few, many = tensors(1024, device="meta"), tensors(8192, heads=2, device="meta")
    assert explain_backend(*few).backend == "reference"
    assert explain_backend(*many).backend == "banded"
    assert explain_backend(*many).reason == (
        "no flash kernel gives log-sum-exps for torch.float32 on meta: tiles in plain PyTorch"
    )


def test_the_limits():
    assert not in_bands("auto", *tensors(255), None, 0.0)
    assert in_bands("auto", *tensors(256), None, 0.0)
    # Nothing to attend to.
    assert not in_bands("banded", *tensors(0), None, 0.0)


def test_a_mask_that_needs_a_gradient_is_dense_and_says_so():
    large, bias = tensors(300), torch.zeros(300, 300, requires_grad=True)
    assert explain_backend(*tensors(300), attn_mask=bias.detach()).backend == "banded"
    with pytest.warns(UserWarning, match="holds all scores, because attn_mask needs a gradient"):
        assert explain_backend(*large, attn_mask=bias) == ("reference", "attn_mask needs a gradient")
    with pytest.warns(UserWarning, match="because attn_mask needs a gradient"):
        rope_attention(*large, attn_mask=bias).sum().backward()
    assert bias.grad is not None
    with pytest.raises(ValueError, match="backend='banded' cannot run: attn_mask needs a gradient"):
        rope_attention(*large, attn_mask=bias, backend="banded")
    with torch.no_grad():
        assert explain_backend(*large, attn_mask=bias).backend == "banded"
