"""The stretched language model: what each rule reads, beside the plain task and by hand."""

import pytest
import torch

from danlu.attention import dynamic_rope_attention
from danlu.lab.errors import TrialError
from danlu.lab.tasks.byte_lm import ByteLM
from danlu.lab.tasks.stretched_lm import StretchedLM, _Stretched
from danlu.lab.trial import find_trial
from danlu.positions import scale_frequencies

SMALL = {"width": 32, "layers": 1, "heads": 2, "batch_size": 8, "context": 16, "windows": 12, "reach": 4}


def options(**changes):
    task = StretchedLM()
    return {**task.fit_options, **task.evaluate_options, **SMALL, **changes}


@pytest.fixture(scope="module")
def fit():
    found = StretchedLM().start(seed=0, steps=20, options=options(lr=0.01))
    for i in range(20):
        found.step(i)
    for block in found.model.blocks:
        # A short fit attends evenly; larger weights make a difference.
        block.qkv.weight.data.mul_(4)
    return found


def evaluated(fit, **changes):
    return StretchedLM().evaluate(fit, seed=0, split="test", options=options(**changes))


def test_without_a_rule_it_is_the_plain_task(fit):
    plain = {**options(), **ByteLM().evaluate_options, **SMALL}
    expected = ByteLM().evaluate(fit, seed=0, split="test", options=plain)
    found = evaluated(fit)
    assert set(found) == {f"bits_per_byte@{r}x" for r in (1, 2, 4)}
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-6)
    window = ByteLM().evaluate(fit, seed=0, split="test", options={**plain, "attention": "window"})
    for name, value in evaluated(fit, local=True).items():
        assert value == pytest.approx(window[name], rel=1e-6)


# The rules themselves are tested in tests/positions.
@pytest.mark.parametrize("rule", ["ntk-mixed", "by-parts"])
def test_rules_agree_at_the_training_length_and_differ_beyond(fit, rule):
    plain, found = evaluated(fit), evaluated(fit, rule=rule)
    assert found["bits_per_byte@1x"] == plain["bits_per_byte@1x"]
    # The factor is that of the length: at 4x the model reads with frequencies for 4.
    model, kept = fit.model, fit.model.inv_freq
    length = {"train_length": 16} if rule == "by-parts" else {}
    model.inv_freq = scale_frequencies(kept, method=rule, factor=4, **length)
    try:
        assert evaluated(fit)["bits_per_byte@4x"] == pytest.approx(found["bits_per_byte@4x"], rel=1e-6)
    finally:
        model.inv_freq = kept
    assert found["bits_per_byte@4x"] != plain["bits_per_byte@4x"]


def test_log_n_scales_from_the_training_length_on(fit):
    plain, scaled = evaluated(fit), evaluated(fit, logn=True)
    assert scaled["bits_per_byte@1x"] == pytest.approx(plain["bits_per_byte@1x"], rel=1e-6)
    assert scaled["bits_per_byte@4x"] != pytest.approx(plain["bits_per_byte@4x"], rel=1e-6)
    q, k, v = torch.randn(3, 1, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    inv_freq = torch.tensor([1.0, 0.1])
    a, b = (_Stretched(context=8, logn=logn)(q, k, v, inv_freq) for logn in (False, True))
    torch.testing.assert_close(a[:, :, :8], b[:, :, :8])
    assert (a[:, :, 8:] - b[:, :, 8:]).abs().amax(-1).min() > 0


def test_dynamic_factors_follow_each_byte(fit):
    plain, static = evaluated(fit), evaluated(fit, rule="ntk-mixed")
    found = evaluated(fit, rule="ntk-mixed", dynamic=True)
    assert found["bits_per_byte@1x"] == pytest.approx(plain["bits_per_byte@1x"], rel=1e-6)
    assert found["bits_per_byte@4x"] not in (plain["bits_per_byte@4x"], static["bits_per_byte@4x"])
    assert evaluated(fit, dynamic=True) == plain
    q, k, v = torch.randn(3, 1, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    inv_freq = torch.tensor([1.0, 0.1])
    out = _Stretched(context=8, rule="ntk-aware", factor=None)(q, k, v, inv_freq)
    expected = dynamic_rope_attention(q, k, v, train_length=8, inv_freq=inv_freq)
    torch.testing.assert_close(out, expected)


def test_unknown_rules_and_models(fit):
    with pytest.raises(TrialError, match="unknown rule 'yarn'; known: default, linear"):
        evaluated(fit, rule="yarn")

    class Other:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(TypeError, match="StretchedLM evaluates a ByteTransformer, not Linear"):
        evaluated(Other())


def test_all_arms_share_their_fits():
    _, trial = find_trial("positions/scaling")
    fits = [trial.tuning_fits(arm, "report") for arm in trial.arms]
    assert all(one == fits[0] for one in fits)
    # All arms are equal at the length by which learning rates are chosen.
    assert trial.selects[0] == "bits_per_byte@1x"
