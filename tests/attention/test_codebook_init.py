"""First codewords by k-means: limits, the objective, a model's quantizers layer by layer."""

import pytest
import torch
from torch import nn

from danlu.attention import VectorQuantizer, VQAttention, init_codebook_from_keys


def keys(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_as_many_codewords_as_keys_are_the_keys():
    module, key = VectorQuantizer(18, 4, 2).double(), keys(2, 2, 9, 4)
    assert init_codebook_from_keys(module, key)[""] < 1e-30
    for head in range(2):
        found = {tuple(row) for row in module.codebook[head].mul(1e6).round().tolist()}
        assert found == {tuple(row) for row in key[:, head].flatten(0, 1).mul(1e6).round().tolist()}
    assert (module.ema_counts == 1).all()
    few = VectorQuantizer(30, 4, 2).double()
    assert init_codebook_from_keys(few, key)[""] < 1e-30
    assert few.codebook.isfinite().all()


def test_separate_clusters_are_found():
    centers = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]], dtype=torch.float64)
    points = (centers[:, None] + 0.1 * keys(4, 30, 2)).flatten(0, 1)[None, None]
    module = VectorQuantizer(4, 2, 1).double()
    init_codebook_from_keys(module, points)
    found = module.codebook[0]
    nearest = torch.cdist(centers, found).min(1)
    assert (nearest.values < 0.1).all()
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert module.ema_counts.tolist() == [[30.0] * 4]
    torch.testing.assert_close(found[nearest.indices[2]], points[0, 0, 60:90].mean(0), rtol=1e-12, atol=1e-12)


def test_iterations_lower_the_error_and_the_seed_decides():
    errors = []
    for iterations in (0, 1, 3, 20):
        module = VectorQuantizer(8, 4, 2).double()
        errors.append(init_codebook_from_keys(module, keys(2, 2, 100, 4), iterations=iterations)[""])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    # What the quantizer itself reports.
    module.eval()
    assert float(module(keys(2, 2, 100, 4)).relative_error) == pytest.approx(errors[-1], rel=1e-9)
    books = []
    for seed in (0, 0, 1):
        module = VectorQuantizer(8, 4, 2).double()
        init_codebook_from_keys(module, keys(2, 2, 100, 4), seed=seed)
        books.append(module.codebook)
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_hidden_keys_do_not_count():
    key = keys(2, 2, 9, 4)
    mask = torch.tensor([[True] * 9, [False] * 5 + [True] * 4])
    key[1, :, :5] = 1e6
    module = VectorQuantizer(3, 4, 2).double()
    init_codebook_from_keys(module, key, key_padding_mask=mask)
    assert module.codebook.abs().max() < 10
    assert float(module.ema_counts.sum()) == 2 * 13


def test_a_model_layer_by_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(VQAttention(8, num_heads=2, num_codes=6, block_size=4) for _ in range(2))
            self.drop = nn.Dropout(0.9)

        def forward(self, hidden, mask=None):
            for layer in self.layers:
                hidden = hidden + self.drop(layer(hidden, mask)[0])
            return hidden

    net, hidden = Net(), keys(2, 20, 8).float()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 15:] = False
    net.layers[1].eval()
    errors = init_codebook_from_keys(net, {"hidden": hidden, "mask": mask})
    assert list(errors) == ["layers.0.quantizer", "layers.1.quantizer"]
    assert net.training
    assert net.drop.training
    assert not net.layers[1].training
    # Evaluation on the same input reports the same errors: the second layer saw the new codebook of the first.
    net.eval()
    state = hidden
    for layer, error in zip(net.layers, errors.values(), strict=True):
        change, quantized = layer(state, mask)
        assert float(quantized.relative_error) == pytest.approx(error, rel=1e-4)
        state = state + change
    assert all((layer.quantizer.batch_counts == 0).all() for layer in net.layers)
    assert not net.layers[0].quantizer._forward_pre_hooks
    assert max(init_codebook_from_keys(net, hidden).values()) < 1
    assert max(init_codebook_from_keys(net, (hidden, mask)).values()) < 1


@pytest.mark.parametrize(
    ("target", "data", "options", "error", "match"),
    [
        (3, keys(1, 2, 5, 4), {}, TypeError, "target must be a torch.nn.Module"),
        (nn.Linear(2, 2), keys(1, 2), {}, ValueError, "target holds no VectorQuantizer, got Linear"),
        (VectorQuantizer(3, 4, 2), (1,), {}, TypeError, "data must be keys"),
        (VectorQuantizer(3, 4, 2), keys(1, 2, 5, 3), {}, ValueError, "for this quantizer"),
        (VectorQuantizer(3, 4, 2), keys(1, 2, 5, 4), {"iterations": -1}, ValueError, "iterations must be at least 0"),
        (VectorQuantizer(3, 4, 2), keys(1, 2, 5, 4), {"seed": 0.5}, TypeError, "seed must be an int"),
        (VectorQuantizer(3, 4, 2), keys(1, 2, 0, 4), {}, ValueError, "there must be a visible key"),
        (
            nn.Sequential(VectorQuantizer(3, 4, 2)),
            keys(1, 2, 5, 4),
            {"key_padding_mask": torch.ones(1, 5).bool()},
            ValueError,
            "goes to a model with its input",
        ),
    ],
)
def test_bad_input(target, data, options, error, match):
    with pytest.raises(error, match=match):
        init_codebook_from_keys(target, data, **options)


def test_a_model_that_does_not_call_its_quantizer():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = VectorQuantizer(3, 4, 2)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="called none of its quantizers"):
        init_codebook_from_keys(Idle(), keys(2, 2))
