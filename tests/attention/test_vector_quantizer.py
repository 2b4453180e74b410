"""The quantizer: its equations, padding, checkpointing, precision, dead codewords, and several processes."""

import copy
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from danlu.attention import Quantized, VectorQuantizer


def keys(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quantizer(codes=6, dim=4, heads=2, *, dtype=torch.float64, **options):
    torch.manual_seed(1)
    return VectorQuantizer(codes, dim, heads, **options).to(dtype)


def expected_update(codebook, counts, key, decay, mask=None):
    """Counts, codebook and codes after one update, token by token."""
    heads, size, _ = codebook.shape
    sums, hits, codes = torch.zeros_like(codebook), torch.zeros(heads, size, dtype=codebook.dtype), []
    for b in range(key.shape[0]):
        for h in range(heads):
            for j in range(key.shape[2]):
                code = int((key[b, h, j] - codebook[h]).square().sum(-1).argmin())
                codes.append(code)
                if mask is None or mask[b, j]:
                    hits[h, code] += 1
                    sums[h, code] += key[b, h, j]
    new_counts = decay * counts + (1 - decay) * hits
    moved = decay * codebook * counts.clamp_min(0.01)[..., None] + (1 - decay) * sums
    return new_counts, moved / new_counts.clamp_min(0.01)[..., None], torch.tensor(codes).view(key.shape[:3])


@pytest.mark.parametrize("masked", [False, True])
def test_equations(masked):
    module = quantizer(decay=0.9)
    assert (module.ema_counts == 1).all()
    mask = torch.tensor([[True] * 7, [True, False, True, True, False, False, True]]) if masked else None
    counts, codebook = module.ema_counts.clone(), module.codebook.clone()
    for step in range(3):
        key = keys(2, 2, 7, 4, seed=step)
        found = module(key, mask)
        new_counts, new_codebook, codes = expected_update(codebook, counts, key, 0.9, mask)
        where = torch.ones(2, 2, 7, dtype=torch.bool) if mask is None else mask[:, None].expand(2, 2, 7)
        assert torch.equal(found.codes[where], codes[where])
        words = torch.stack([codebook[h][codes[:, h]] for h in range(2)], 1)
        torch.testing.assert_close(found.key[where], words[where], rtol=1e-12, atol=1e-12)
        assert (found.key[~where] == 0).all()
        distances = (key - words).square().sum(-1)
        visible = 14 if mask is None else int(mask.sum())
        torch.testing.assert_close(found.loss, 1e-4 * distances[where].sum() / visible, rtol=1e-12, atol=0)
        error = distances[where].sum() / key.square().sum(-1)[where].sum()
        torch.testing.assert_close(found.relative_error, error, rtol=1e-12, atol=0)
        used = [len(set(codes[:, h][where[:, h]].tolist())) / 6 for h in range(2)]
        torch.testing.assert_close(found.usage, torch.tensor(used, dtype=torch.float64), rtol=1e-12, atol=0)
        # The codebook of a forward is that of its codes until the next one.
        torch.testing.assert_close(module.codebook, codebook, rtol=1e-12, atol=1e-12)
        module.update()
        counts, codebook = new_counts, new_codebook
        torch.testing.assert_close(module.ema_counts, counts, rtol=1e-12, atol=0)
        torch.testing.assert_close(module.codebook, codebook, rtol=1e-12, atol=1e-12)


def test_golden_update():
    module = quantizer(2, 1, 1, decay=0.5)
    module.set_codebook(torch.tensor([[[0.0], [10.0]]]))
    found = module(torch.tensor([1.0, 2.0, 9.0]).double().view(1, 1, 3, 1))
    assert found.codes.tolist() == [[[0, 0, 1]]]
    assert float(found.loss) == pytest.approx(1e-4 * (1 + 4 + 1) / 3, rel=1e-12)
    assert float(found.relative_error) == pytest.approx(6 / 86, rel=1e-12)
    module.update()
    # n = 0.5 * 1 + 0.5 * (2, 1), m = 0.5 * (0, 10) + 0.5 * (3, 9).
    assert module.ema_counts.tolist() == [[1.5, 1.0]]
    assert module.codebook.flatten().tolist() == pytest.approx([1.0, 9.5], rel=1e-12)


def test_a_codeword_that_nothing_comes_to_stays_and_then_fades():
    module = quantizer(2, 1, 1, decay=0.5)
    module.set_codebook(torch.tensor([[[0.0], [10.0]]]))
    for _ in range(4):
        module(torch.zeros(1, 1, 3, 1).double())
        module.update()
    assert float(module.codebook[0, 1, 0]) == pytest.approx(10.0, rel=1e-12)
    for _ in range(6):
        module(torch.zeros(1, 1, 3, 1).double())
        module.update()
    # n = 2^-10 is below 0.01.
    assert float(module.codebook[0, 1, 0]) == pytest.approx(10 * 2**-10 / 0.01, rel=1e-9)


def test_gradients():
    module, key = quantizer(commitment=0.5), keys(2, 2, 7, 4).requires_grad_()
    found = module(key)
    upstream = keys(2, 2, 7, 4, seed=5)
    (through,) = torch.autograd.grad((found.key * upstream).sum(), key, retain_graph=True)
    torch.testing.assert_close(through, upstream, rtol=0, atol=0)
    (commit,) = torch.autograd.grad(found.loss, key)
    torch.testing.assert_close(commit, 0.5 * 2 * (key - found.key).detach() / 14, rtol=1e-12, atol=1e-15)
    assert not module.codebook.requires_grad
    assert not found.usage.requires_grad
    assert not found.relative_error.requires_grad
    assert list(module.parameters()) == []


def test_padding_changes_nothing():
    mask = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    results = []
    for filler in (0.0, 1e4, float("nan"), float("inf")):
        module, key = quantizer(reseed_below=0.5), keys(2, 2, 7, 4)
        key.transpose(1, 2)[~mask] = filler
        key.requires_grad_()
        found = module(key, mask)
        (found.loss + found.key.sum()).backward()
        module.update()
        assert (key.grad.transpose(1, 2)[~mask] == 0).all()
        results.append([*found[:1], *found[2:], key.grad, *module.buffers()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    nothing = quantizer()
    before = copy.deepcopy(nothing.state_dict())
    found = nothing(keys(2, 2, 7, 4), torch.zeros(2, 7, dtype=torch.bool))
    nothing.update()
    assert [float(x) for x in (found.loss, found.relative_error, found.usage.sum())] == [0, 0, 0]
    assert all(torch.equal(before[name], value) for name, value in nothing.state_dict().items())


def test_evaluation_changes_nothing_and_updates_come_with_the_next_forward():
    module = quantizer()
    before = copy.deepcopy(module.state_dict())
    module.eval()(keys(1, 2, 9, 4))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    module.train()(keys(1, 2, 9, 4))
    assert torch.equal(module.ema_sums, before["ema_sums"])
    assert not torch.equal(module.batch_sums, before["batch_sums"])
    by_hand = copy.deepcopy(module)
    by_hand.update()
    module(keys(1, 2, 9, 4, seed=1))
    assert torch.equal(module.codebook, by_hand.codebook)


def test_micro_batches_make_one_update_by_hand():
    whole, parts = (quantizer(auto_update=False) for _ in range(2))
    key = keys(4, 2, 9, 4)
    whole(key)
    for part in key.split(1):
        parts(part)
    for module in (whole, parts):
        module.update()
    torch.testing.assert_close(parts.codebook, whole.codebook, rtol=1e-12, atol=1e-14)
    assert not torch.equal(whole.codebook, quantizer().codebook)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.dense = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)
        self.quantizer = VectorQuantizer(6, 4, 2, reseed_below=0.9, decay=0.9)

    def forward(self, hidden):
        found = self.quantizer(self.dense(hidden).unflatten(-1, (2, 4)).transpose(1, 2))
        return self.drop(found.key.transpose(1, 2).flatten(2)) + 1e4 * found.loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_updates_once_and_gives_the_same_gradients(reentrant):
    """The recomputation runs with the codebook of its forward, and adds nothing."""
    runs = []
    for saved in (False, True):
        layer = Layer()
        gradients = []
        torch.manual_seed(7)
        for step in range(4):
            hidden = keys(2, 9, 8, seed=step, dtype=torch.float32).requires_grad_()
            out = checkpoint(layer, hidden, use_reentrant=reentrant) if saved else layer(hidden)
            out.square().sum().backward()
            gradients += [hidden.grad, layer.dense.weight.grad.clone()]
            with torch.no_grad():
                layer.dense.weight -= 0.001 * layer.dense.weight.grad
            layer.dense.weight.grad = None
        assert layer.quantizer.codebook.isfinite().all()
        runs.append([*gradients, *layer.quantizer.buffers()])
    for plain, saved in zip(*runs, strict=True):
        torch.testing.assert_close(saved, plain, rtol=1e-6, atol=1e-6)


def test_an_update_in_the_recomputation_would_be_wrong():
    """What the test above guards against: with updates in every forward the gradients of a checkpoint change."""

    class Eager(Layer):
        def forward(self, hidden):
            out = super().forward(hidden)
            self.quantizer.update()
            return out

    gradients = []
    for saved in (False, True):
        layer, hidden = Eager(), keys(2, 9, 8, dtype=torch.float32).requires_grad_()
        torch.manual_seed(7)
        out = checkpoint(layer, hidden, use_reentrant=False) if saved else layer(hidden)
        out.square().sum().backward()
        gradients.append(hidden.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_a_checkpoint_of_the_training_resumes_exactly():
    whole, half = quantizer(reseed_below=0.9), quantizer(reseed_below=0.9)
    for step in range(3):
        whole(keys(1, 2, 9, 4, seed=step))
        half(keys(1, 2, 9, 4, seed=step))
    rest = VectorQuantizer(6, 4, 2, reseed_below=0.9).double()
    rest.load_state_dict(half.state_dict())
    for step in range(3, 6):
        one, two = whole(keys(1, 2, 9, 4, seed=step)), rest(keys(1, 2, 9, 4, seed=step))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_dead_codewords_are_replaced_by_keys_of_the_batch():
    module = quantizer(8, 2, 1, decay=0.5, reseed_below=0.4)
    far = torch.full((1, 8, 2), 100.0)
    far[0, 0] = 0.0
    module.set_codebook(far)
    key = keys(2, 1, 50, 2)
    seen = set()
    for _ in range(4):
        module(key)
        module.update()
        alive = module.codebook[0][(module.codebook[0].abs() < 50).all(-1)]
        seen.add(len(alive))
        for word in module.codebook[0][1:]:
            if float(word.abs().max()) < 50 and len(seen) == 1:
                assert float((key[:, 0].flatten(0, 1) - word).abs().sum(-1).min()) < 1e-12
    # After two updates n = 0.25 of the seven that nothing came to.
    assert float(module(key).usage) > 0.8
    never = quantizer(8, 2, 1, decay=0.5)
    never.set_codebook(far)
    for _ in range(4):
        never(key)
    assert float(never(key).usage) == pytest.approx(1 / 8)


def test_candidates_are_visible_keys_spread_over_the_batch():
    module = quantizer(16, 4, 2, reseed_below=0.1)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :30] = False
    key = keys(2, 2, 40, 4)
    places = []
    for _ in range(2):
        module(key, mask)
        picked = module.candidates
        flat = key.transpose(0, 1).flatten(1, 2)
        index = (picked[:, :, None] - flat[:, None]).abs().sum(-1).argmin(-1)
        torch.testing.assert_close(picked, flat.gather(1, index[..., None].expand(-1, -1, 4)), rtol=0, atol=0)
        assert torch.equal(index[0], index[1])
        assert mask.flatten()[index[0]].all()
        assert len(set(index[0].tolist())) >= 15
        places.append(index[0].tolist())
        module.update()
    assert places[0] != places[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    module = VectorQuantizer(6, 4, 2, reseed_below=0.5).to(dtype)
    assert {b.dtype for b in module.buffers()} == {torch.float32, torch.int64}
    key = keys(2, 2, 9, 4, dtype=dtype).requires_grad_()
    found = module(key)
    assert (found.key.dtype, found.loss.dtype, found.relative_error.dtype) == (dtype, torch.float32, torch.float32)
    (found.key.float().sum() + found.loss).backward()
    assert key.grad.isfinite().all()
    exact = copy.deepcopy(module)
    with torch.autocast("cpu", dtype=dtype):
        again = exact.eval()(key)
    assert torch.equal(again.codes, found.codes)
    many = VectorQuantizer(2, 4, 1, decay=0.999).to(dtype)
    for _ in range(50):
        many(torch.ones(1, 1, 9, 4, dtype=dtype))
    # 0.999 is 1 in bf16 and an average would not move.
    moved = 1 - 0.999**49
    assert float(many.ema_counts.sum()) == pytest.approx(2 - 2 * moved + 9 * moved, rel=1e-4)


def test_compiles_whole():
    module, key = VectorQuantizer(6, 4, 2, reseed_below=0.5), keys(2, 2, 9, 4, dtype=torch.float32)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(3):
        given = (key + step).requires_grad_()
        for mine, theirs in zip(compiled(given), eager(given), strict=True):
            torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_two_processes_equal_one():
    """Statistics are summed over the processes, also inside DistributedDataParallel and under checkpointing."""
    script = Path(__file__).with_name("vq_script.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "two processes equal one"


def test_empty_batch_and_repr():
    module = quantizer()
    found = module(torch.zeros(2, 2, 0, 4).double())
    assert isinstance(found, Quantized)
    assert found.key.shape == (2, 2, 0, 4)
    assert math.isfinite(float(found.loss))
    assert "6, 4, 2, decay=0.99, commitment=0.0001, reseed_below=None, auto_update=True" in repr(module)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_codes": 0}, ValueError, "num_codes must be at least 1, got 0"),
        ({"dim": 2.0}, TypeError, "dim must be an int"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\)"),
        ({"commitment": -1.0}, ValueError, "commitment must be in"),
        ({"reseed_below": -0.1}, ValueError, "reseed_below must be in"),
        ({"init_std": "wide"}, TypeError, "init_std must be a real number"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        VectorQuantizer(**{"num_codes": 4, "dim": 4, "num_heads": 2, **options})


@pytest.mark.parametrize(
    ("key", "mask", "error", "match"),
    [
        (torch.zeros(1, 3, 5, 4), None, ValueError, r"\(B, 2, N, 4\) for this quantizer, got \(1, 3, 5, 4\)"),
        (torch.zeros(1, 2, 5, 3), None, ValueError, "for this quantizer"),
        (torch.zeros(2, 5, 4), None, ValueError, "for this quantizer"),
        (torch.zeros(1, 2, 5, 4).long(), None, TypeError, "key must be a floating-point tensor"),
        (torch.zeros(1, 2, 5, 4), torch.ones(1, 5), TypeError, "key_padding_mask must be a bool tensor"),
        (torch.zeros(1, 2, 5, 4), torch.ones(1, 4).bool(), ValueError, r"must have shape \(B, N\) = \(1, 5\)"),
    ],
)
def test_bad_input(key, mask, error, match):
    with pytest.raises(error, match=match):
        VectorQuantizer(6, 4, 2)(key, mask)


def test_bad_codebook():
    with pytest.raises(ValueError, match=r"codebook must have shape \(2, 6, 4\), got \(6, 4\)"):
        VectorQuantizer(6, 4, 2).set_codebook(torch.zeros(6, 4))
