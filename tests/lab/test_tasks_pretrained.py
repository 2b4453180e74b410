"""The pretrained language model as a task: the same documents for all, readings that leave no trace, known values."""

import json

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from danlu.attention import rope_attention
from danlu.lab.errors import TrialError
from danlu.lab.job import run_job
from danlu.lab.tasks.pretrained_lm import PretrainedFit, PretrainedLM, window_attention
from danlu.lab.trial import find_trial
from danlu.positions import apply_rope, rope_frequencies

TASK = PretrainedLM()
OPTIONS = {
    **TASK.fit_options,
    **TASK.evaluate_options,
    "model": "random",
    "dtype": "float32",
    "reach": 2.0,
    "last": 16,
}


def sharp_fit() -> PretrainedFit:
    """With weights that make positions matter."""
    fit = PretrainedFit(OPTIONS)
    for name, parameter in fit.model.named_parameters():
        if any(f"{kind}_proj.weight" in name for kind in "qkvo"):
            parameter.data.mul_(20)
    return fit


def losses(fit: PretrainedFit, **options) -> dict[str, float]:
    return dict(TASK.evaluate(fit, seed=1, split="test", options={**OPTIONS, **options}))


def test_documents_differ_and_are_long_enough():
    fit = PretrainedFit(OPTIONS)
    found = [fit.document(index, 129) for index in range(4)]
    assert all(len(tokens) == 129 for tokens in found)
    assert len({tuple(tokens.tolist()) for tokens in found}) == 4
    # A document that is long enough for more begins in the same way.
    assert torch.equal(fit.document(1, 100), fit.document(1, 129)[:100])
    with pytest.raises(TrialError, match=r"there are \d+ documents of 90000 tokens, so no document 5000"):
        fit.document(5000, 90000)


def test_losses_are_those_of_the_model_at_the_same_targets():
    fit = sharp_fit()
    tokens = fit.document(1, 129)
    with torch.no_grad():
        rows = F.cross_entropy(fit.pretrained(tokens[None, :-1]).logits[0], tokens[1:], reduction="none")
        cut = F.cross_entropy(fit.pretrained(tokens[None, 64:-1]).logits[0], tokens[65:], reduction="none")
    plain = losses(fit)
    assert plain["loss@within"] == pytest.approx(float(rows[48:64].mean()), rel=1e-5)
    assert plain["loss@beyond"] == pytest.approx(float(rows[112:].mean()), rel=1e-5)
    assert losses(fit, reading="truncated") == {"loss@beyond": pytest.approx(float(cut[48:].mean()), rel=1e-5)}
    # The trained length is not beyond anything.
    window = losses(fit, reading="window")
    assert window["loss@within"] == pytest.approx(plain["loss@within"], rel=1e-5)


def test_readings_differ_and_leave_no_trace():
    fit = sharp_fit()
    plain = losses(fit)
    found = {
        str(options): losses(fit, **options)["loss@beyond"]
        for options in (
            {"reading": "pi"},
            {"reading": "ntk_aware"},
            {"reading": "ntk_mixed"},
            {"reading": "window"},
            {"reading": "rerope"},
            {"reading": "rerope", "window": 0.25},
            {"reading": "rerope", "logn": True},
        )
    }
    assert len({*found.values(), plain["loss@beyond"]}) == len(found) + 1
    assert losses(fit, reading="rerope", window=2.0) == pytest.approx(plain, rel=1e-4)
    assert losses(fit) == plain


def test_interpolation_is_half_of_every_position():
    fit = sharp_fit()
    tokens = fit.document(1, 129)[None, :-1]
    seen = losses(fit, reading="pi")["loss@beyond"]
    with torch.no_grad():
        logits = fit.pretrained(
            tokens, position_ids=torch.arange(128)[None] / 2, attention_mask=torch.ones_like(tokens)
        )
    expected = F.cross_entropy(logits.logits[0, 112:], fit.document(1, 129)[113:])
    assert seen == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("length", "window"), [(20, 32), (32, 32), (700, 32), (1100, 600)])
def test_window_attention_is_the_masked_definition(length, window):
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=torch.Generator().manual_seed(heads), dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    slots = torch.arange(length)
    mask = slots[:, None] - slots < window
    turned = (apply_rope(x, slots, rope_frequencies(8)) for x in (query, key))
    found = window_attention(*turned, value, window=window, scale=0.3)
    expected = rope_attention(query, key, value, attn_mask=mask, scale=0.3, backend="reference")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_job_runs_from_end_to_end(tmp_path):
    _, trial = find_trial("attention/rerope_pretrained")
    options, _ = trial.split(trial.points("rerope", "ci")[0])
    evaluations = [
        {"key": arm, "split": "test", "options": trial.split(trial.points(arm, "ci")[0])[1]} for arm in trial.arms
    ]
    job = {
        "trial": "attention/rerope_pretrained",
        "seed": 0,
        "steps": 0,
        "options": options,
        "weights": str(tmp_path / "weights"),
        "partial": str(tmp_path / "partial"),
        "checkpoint_every": 100,
        "evaluations": evaluations,
    }
    first, again = (json.loads(run_job(json.dumps(job), lambda *_: None)) for _ in range(2))
    assert first["metrics"] == again["metrics"]
    assert first["metrics"].keys() == trial.arms.keys()
    needed = {(part.candidate, part.metric) for part in trial.decides} | {
        (part.baseline, part.metric) for part in trial.decides
    }
    assert all(metric in first["metrics"][arm] for arm, metric in needed)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "gpt"}, "unknown model 'gpt'; known: smollm2, random"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; known: bfloat16, float32"),
        ({"reading": "yarn"}, "unknown reading 'yarn'; known: rope, pi"),
    ],
)
def test_unknown_options_are_refused(changes, match):
    options = {**OPTIONS, **changes}
    with pytest.raises(TrialError, match=match):
        TASK.evaluate(TASK.start(seed=0, steps=0, options=options), seed=0, split="test", options=options)
    with pytest.raises(TrialError, match="is not trained"):
        PretrainedFit(OPTIONS).step(0)
