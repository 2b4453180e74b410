"""The model with quantized keys: arms that differ in nothing else, exact resume, metrics, and its trial."""

import math

import pytest
import torch

from danlu.attention import vq_attention
from danlu.lab.errors import TrialError
from danlu.lab.tasks.quantized_lm import QuantizedLM, near_bias
from danlu.lab.trials.attention.vq_attention import TRIAL

TASK = QuantizedLM()
SMALL = {"width": 16, "heads": 2, "layers": 2, "context": 40, "block_size": 8, "batch_size": 4, "windows": 8}


def options(**changes):
    return {**TASK.fit_options, **TASK.evaluate_options, **SMALL, **changes}


def start(chosen, steps=6, seed=0):
    return TASK.start(seed=seed, steps=steps, options=chosen)


ARMS = [{"attention": "rope"}, {"attention": "bias"}, {"codes": 8}, {"codes": 8, "reseed_below": 0.9, "rerope": True}]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_fit_resumes_bit_for_bit(arm):
    chosen = options(lr=0.02, **arm)
    whole = start(chosen)
    points = [whole.step(i) for i in range(6)]
    half = start(chosen)
    for i in range(3):
        assert half.step(i) == points[i]
    rest = start(chosen)
    for tensor in [*rest.model.parameters(), *rest.model.buffers()]:
        tensor.data.fill_(7)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for first, second in zip(whole.model.state_dict().values(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_arms_without_a_quantizer_differ_in_nothing_else():
    """With every key a codeword, the quantized layer is the exact one; and both have as many parameters."""
    exact, quantized = (start(options(attention=kind, codes=160, layers=1)).model for kind in ("bias", "vq"))
    assert sum(p.numel() for p in exact.parameters()) == sum(p.numel() for p in quantized.parameters())
    mine, theirs = exact.blocks[0].attention, quantized.blocks[0].attention
    with torch.no_grad():
        mine.bias.normal_()
        theirs.relative_bias.copy_(mine.bias)
        for part, layer in zip(mine.qkv.weight.chunk(3), (theirs.query, theirs.key, theirs.value), strict=True):
            layer.weight.copy_(part)
        theirs.out.weight.copy_(mine.out.weight)
        hidden = torch.randn(4, 40, 16)
        keys = theirs.key(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
        keys = torch.nn.functional.layer_norm(keys, (8,)) * 8**-0.25
        theirs.quantizer.set_codebook(keys.transpose(0, 1).flatten(1, 2))
        torch.testing.assert_close(mine(hidden), theirs.eval()(hidden)[0], rtol=1e-5, atol=1e-5)


def test_near_bias_is_that_of_the_attention():
    bias = torch.linspace(-2, 3, 16, dtype=torch.float64).view(1, 16)
    value = torch.eye(24, dtype=torch.float64).view(1, 1, 24, 24)
    zeros = torch.zeros(1, 1, 24, 4, dtype=torch.float64)
    weights = vq_attention(zeros, zeros, value, torch.zeros(1, 1, 4), block_size=8, bias=bias, backend="reference")
    torch.testing.assert_close(near_bias(bias, 24, 8)[None].softmax(-1), weights, rtol=1e-12, atol=1e-15)


def test_metrics_of_a_constructed_model():
    chosen = options(codes=8)
    fit = start(chosen)
    with torch.no_grad():
        fit.model.head.weight.zero_()
        for block in fit.model.blocks:
            block.attention.key.weight.zero_()
    found = TASK.evaluate(fit, seed=0, split="test", options=chosen)
    assert found["bits_per_byte"] == pytest.approx(8.0, rel=1e-6)
    assert found["codes_used"] == 1 / 8  # all keys are 0
    assert found == TASK.evaluate(fit, seed=1, split="test", options=chosen)
    assert TASK.evaluate(start(options(attention="bias")), seed=0, split="validation", options=chosen).keys() == {
        "bits_per_byte"
    }


def test_training_lowers_the_loss_and_moves_the_codebook():
    chosen = options(codes=8, lr=0.01)
    fit = start(chosen, 30)
    before = fit.model.blocks[0].attention.quantizer.codebook.clone()
    losses = [fit.step(i)["train_loss"] for i in range(30)]
    assert losses[-1] < losses[0] - 0.5
    assert all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(fit.model.blocks[0].attention.quantizer.codebook, before)


def test_trial_is_declared_fairly():
    for size in TRIAL.sizes:
        fits = {arm: {p["lr"] for p in TRIAL.points(arm, size)} for arm in TRIAL.arms}
        assert len({tuple(sorted(rates)) for rates in fits.values()}) == 1


def test_bad_options():
    with pytest.raises(TrialError, match="unknown attention 'linear'; known: rope, bias, vq"):
        start(options(attention="linear"))
    fit = start(options())
    fit.model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="evaluates a QuantizedTransformer, not Linear"):
        TASK.evaluate(fit, seed=0, split="test", options=options())
