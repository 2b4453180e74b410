"""The byte model with linear attention: exact resume, arms that differ as they say, known metrics, the trial."""

import math

import pytest
import torch
from torch import nn

from danlu.attention import FavorFeatures, LinearAttention, SoftVQFeatures
from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.linear_byte_lm import LinearByteLM

TASK = LinearByteLM()
KINDS = ("softmax_rope", "elu1", "elu1_rope", "favor_rope", "softvq_rope")


def options(**changes):
    small = {"context": 16, "batch_size": 4, "width": 16, "layers": 2, "heads": 2, "features": 8, "windows": 12}
    return {**TASK.fit_options, **TASK.evaluate_options, **small, **changes}


def start(chosen, steps=6, seed=0):
    return TASK.start(seed=seed, steps=steps, options=chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_resumes_bit_for_bit(kind):
    chosen = options(kind=kind)
    whole = start(chosen)
    points = [whole.step(i) for i in range(6)]
    half = start(chosen)
    for i in range(3):
        assert half.step(i) == points[i]
    rest = start(chosen)
    for tensor in (*rest.model.parameters(), *rest.model.buffers()):
        tensor.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for (name, first), second in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_the_arms_are_what_they_say():
    models = {kind: start(options(kind=kind)).model for kind in KINDS}
    attends = {kind: model.blocks[0].attention for kind, model in models.items()}
    assert attends["softmax_rope"].attend is None
    assert attends["elu1"].rope is attends["elu1_rope"].rope is None
    assert (attends["elu1"].attend.rope_base, attends["elu1_rope"].attend.rope_base) == (None, 10000.0)
    features = [block.attention.attend.features for block in models["favor_rope"].blocks]
    assert all(isinstance(one, FavorFeatures) and one.num_features == 8 for one in features)
    assert not torch.equal(features[0].projection, features[1].projection)
    soft = attends["softvq_rope"].attend
    assert isinstance(soft.features, SoftVQFeatures)
    assert (soft.features.codebook.shape, soft.features.sigma, soft.rope_base) == ((2, 8, 8), 0.5, 10000.0)
    counts = {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()}
    # Two layers of two codebooks of eight codes; all else is the same.
    counts["softvq_rope"] -= 2 * 2 * 8 * 8
    assert len(set(counts.values())) == 1
    losses = {kind: start(options(kind=kind)).step(0)["train_loss"] for kind in ("softmax_rope", "elu1", "elu1_rope")}
    assert len(set(losses.values())) == 3


def test_many_features_come_near_to_softmax():
    """With the weights of the baseline, outputs of FAVOR+ approach its outputs."""
    baseline = start(options()).model.eval()
    tokens = torch.arange(48).view(3, 16)
    exact = baseline(tokens).detach()
    errors = []
    for count in (8, 4096):
        model = start(options(kind="favor_rope", features=count)).model.eval()
        model.load_state_dict(baseline.state_dict(), strict=False)
        errors.append(float((model(tokens).detach() - exact).norm() / exact.norm()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_causal(kind):
    model = start(options(kind=kind)).model.eval()
    tokens = torch.arange(32).view(2, 16)
    changed = tokens.clone()
    changed[:, 9:] = 200
    torch.testing.assert_close(model(tokens)[:, :9], model(changed)[:, :9], rtol=1e-4, atol=1e-6)
    assert (model(tokens)[:, 9:] - model(changed)[:, 9:]).abs().amax() > 1e-2


class Known(nn.Module):
    """Even odds on all bytes in the first half of a window, and on half of them, with all of the text, later."""

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 256)
        logits[:, tokens.shape[1] // 2 :, 128:] = -1000
        return logits


def test_metrics_of_known_predictions():
    fit, chosen = start(options()), options()
    fit.model = Known()
    found = TASK.evaluate(fit, seed=0, split="test", options=chosen)
    # Python source is ASCII but for some bytes; these windows are.
    assert found["bits_per_byte@last_half"] == pytest.approx(7, abs=1e-6)
    assert found["bits_per_byte"] == pytest.approx(7.5, abs=1e-6)
    untrained = TASK.evaluate(start(options()), seed=0, split="validation", options=chosen)
    assert 7 < untrained["bits_per_byte"] < 9
    assert all(math.isfinite(value) for value in untrained.values())


@pytest.mark.trial
def test_trial_runs_at_ci_size(tmp_path):
    with Store(tmp_path) as store:
        outcome = run_trial("linear_attention", size="ci", store=store)
    assert len(outcome.arms) == 5
    for arm in outcome.arms:
        assert {"bits_per_byte", "bits_per_byte@last_half"} <= arm.metrics.keys()


def test_unknown_kind():
    with pytest.raises(TrialError, match="unknown kind 'cosine'; known: softmax_rope, elu1"):
        start(options(kind="cosine"))


def test_a_linear_attention_is_held_by_the_linear_arms():
    assert isinstance(start(options(kind="elu1")).model.blocks[1].attention.attend, LinearAttention)
