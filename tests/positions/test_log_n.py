"""The factor of queries that see more keys than in training."""

import math

import pytest
import torch

from danlu.positions import logn_scale


def test_definition():
    visible = torch.tensor([[0, 1, 2], [511, 512, 4096]])
    train = torch.tensor([[2, 2, 2], [511, 512, 4096]], dtype=torch.float64).log() / math.log(512)
    torch.testing.assert_close(logn_scale(visible, 512, "train"), train, rtol=1e-15, atol=0)
    post = logn_scale(visible, 512)
    assert post.tolist()[0] == [1, 1, 1]
    assert post.tolist()[1][:2] == [1, 1]
    assert float(post[1, 2]) == pytest.approx(4 / 3, abs=1e-15)
    assert float(logn_scale(512, 512, "train")) == 1
    assert logn_scale(3, 512).shape == ()


def test_the_entropy_of_uniform_noise_stays():
    """What the factor is for: attention over 16 times as many keys keeps about its entropy per logarithm of keys."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    for keys in (256, 4096):
        scores = 3 * torch.randn(200, keys, generator=generator, dtype=torch.float64) * logn_scale(keys, 256)
        p = scores.softmax(-1)
        shares.append(float(-(p * p.log()).sum(-1).mean()))
    plain = 3 * torch.randn(200, 4096, generator=generator, dtype=torch.float64)
    without = float(-(plain.softmax(-1) * plain.log_softmax(-1)).sum(-1).mean())
    assert shares[1] - shares[0] < without - shares[0]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((4, 1), ValueError, "train_length must be at least 2"),
        ((4, 512.0), TypeError, "train_length must be an int"),
        ((-1, 512), ValueError, "visible must be at least 0"),
        ((torch.ones(2), 512), TypeError, "visible must be integers"),
        ((4, 512, "always"), ValueError, "mode must be one of"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        logn_scale(*arguments)
