"""The task of the precision trials: what it measures, that a fit resumes bit for bit, and that its trials run."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.lab.data import python_source
from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.precision_lm import PrecisionLM
from danlu.lab.tasks.training import generator
from danlu.lab.trial import find_trial

SMALL = {"context": 16, "batch_size": 4, "width": 16, "layers": 1, "heads": 2, "windows": 3, "report_steps": 4}


def options(**changes):
    task = PrecisionLM()
    return {**task.fit_options, **task.evaluate_options, **SMALL, **changes}


def started(steps=6, seed=0, **changes):
    return PrecisionLM().start(seed=seed, steps=steps, options=options(**changes))


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_fit_is_a_function_of_its_seed_and_resumes_bit_for_bit(changes):
    whole = started(**changes)
    points = [whole.step(i) for i in range(6)]
    half = started(**changes)
    assert [half.step(i) for i in range(3)] == points[:3]
    rest = started(**changes)
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for (name, first), second in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    assert started(seed=1, **changes).step(0) != points[0]
    # AdamW keeps two numbers per parameter.
    parameters = sum(p.numel() for p in whole.model.parameters())
    assert sum(tensor.numel() for tensor in whole.optimizer_state()) == 2 * parameters


def test_bits_per_byte_by_hand():
    fit = started()
    fit.step(0)
    found = PrecisionLM().evaluate(fit, seed=0, split="test", options=options(report_steps=0))
    text = torch.frombuffer(bytearray(b"\n".join(python_source().test)), dtype=torch.uint8)
    starts = torch.randint(len(text) - 16, (3, 1), generator=generator("test", 16))
    windows = text[starts + torch.arange(17)].long()
    with torch.no_grad():
        loss = F.cross_entropy(fit.model(windows[:, :-1]).transpose(1, 2), windows[:, 1:])
    assert found == {"bits_per_byte": pytest.approx(float(loss) / math.log(2), rel=1e-6)}


def test_metrics_of_float32_and_of_unscaled_float16():
    task = PrecisionLM()
    base = task.evaluate(started(), seed=0, split="test", options=options())
    assert (base["speed_up"], base["loss_gap_percent"], base["underflow_percent"], base["skipped_steps"]) == (
        1,
        0,
        0,
        0,
    )
    assert "break_even_steps" not in base
    assert base["peak_memory_mib"] > 0
    changes = {"precision": "fp16", "loss_scale": "none", "loss_weight": 1e-9}
    lost = task.evaluate(started(**changes), seed=0, split="test", options=options(**changes))
    assert lost["underflow_percent"] == 100
    changes |= {"loss_scale": "dynamic", "loss_weight": 1.0}
    kept = task.evaluate(started(**changes), seed=0, split="test", options=options(**changes))
    assert kept["underflow_percent"] < 50
    assert kept["bits_per_byte"] == pytest.approx(base["bits_per_byte"], abs=0.1)


def test_compiled_arms_share_their_fits_and_have_no_memory_on_a_cpu():
    task = PrecisionLM()
    assert "compile" not in task.fit_options
    chosen = options(precision="bf16", compile=True, backend="aot_eager")
    found = task.evaluate(started(precision="bf16"), seed=0, split="test", options=chosen)
    assert "peak_memory_mib" not in found
    assert found["loss_gap_percent"] < 5
    assert found["first_step_seconds"] * 1e3 > found["step_milliseconds"]


def test_loss_weight_is_not_part_of_what_is_reported():
    plain, weighted = started().step(0), started(loss_weight=1e-3).step(0)
    assert weighted["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)
    assert plain["log2_loss_scale"] == 0
    assert started(precision="fp16").step(0)["log2_loss_scale"] == 16
    assert started(precision="fp16", loss_scale="1024").step(0)["log2_loss_scale"] == 10


@pytest.mark.parametrize("changes", [{"precision": "fp8"}, {"loss_scale": "large"}])
def test_unknown_choice(changes):
    with pytest.raises(TrialError, match="known: "):
        started(**changes)


def test_the_compiler_is_not_part_of_the_smallest_size():
    _, trial = find_trial("precision/precision")
    assert trial.sizes["ci"].options["backend"] == "eager"
    assert {"fp32", "bf16", "fp16", "fp32_compile", "bf16_compile"} == set(trial.arms)


@pytest.mark.trial
def test_loss_scaling_repairs_what_underflows(tmp_path):
    """The claim at the size of seconds: it is a matter of arithmetic and not of scale."""
    with Store(tmp_path) as store:
        outcome = run_trial("precision/loss_scaling", size="ci", store=store)
    lost = outcome.arm("fp16_unscaled").metrics["underflow_percent"]
    assert min(lost.values()) > 99
    assert outcome.verdict in ("holds", "holds in part")
