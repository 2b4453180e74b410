"""Tasks that compare ways to attend: what they ask, what they measure, and that a fit resumes exactly."""

import math

import pytest
import torch
from torch.nn import functional as F

from danlu.attention import attention_mask
from danlu.lab.errors import TrialError
from danlu.lab.runner import run_trial
from danlu.lab.store import Store
from danlu.lab.tasks.byte_attention import MASK, ByteAttention, byte_split
from danlu.lab.tasks.kernel_bytes import KernelBytes, causal_weights
from danlu.lab.tasks.mask_kind_bytes import MaskKindBytes, _questions, attention_matrices, layer_kinds

SMALL = {"width": 16, "context": 16, "batch_size": 3, "heads": 2, "windows": 8, "lr": 0.01}
ARMS = [
    ("continuation", "causal"),
    ("continuation", "prefix"),
    ("continuation", "forward_backward"),
    ("continuation", "alternate"),
    ("masked", "causal"),
    ("masked", "bidirectional"),
    ("masked", "forward_backward"),
    ("masked", "alternate"),
]
arms = pytest.mark.parametrize(("objective", "kind"), ARMS)


def all_options(task, **changes):
    return {**task.fit_options, **task.evaluate_options, **SMALL, **changes}


def resumes(task, metrics: set[str], **changes) -> None:
    options = all_options(task, **changes)
    whole = task.start(seed=0, steps=6, options=options)
    points = [whole.step(i) for i in range(6)]
    assert all(math.isfinite(point["train_loss"]) for point in points)
    half, rest, other = (task.start(seed=seed, steps=6, options=options) for seed in (0, 0, 1))
    assert [half.step(i) for i in range(3)] == points[:3]
    for parameter in rest.model.parameters():
        parameter.data.fill_(7.0)
    rest.load(half.state())
    assert [rest.step(i) for i in range(3, 6)] == points[3:]
    for first, second in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert other.step(0) != points[0]
    found = task.evaluate(whole, seed=0, split="test", options=options)
    assert found.keys() == metrics
    assert all(math.isfinite(value) for value in found.values())
    assert found == task.evaluate(whole, seed=5, split="test", options=options)
    assert found != task.evaluate(whole, seed=0, split="validation", options=options)


@arms
def test_a_fit_under_a_mask_resumes_bit_for_bit(objective, kind):
    resumes(MaskKindBytes(), {"bits_per_byte", "effective_rank", "n_eff"}, objective=objective, kind=kind)


@pytest.mark.parametrize("kernel", ["softmax", "elu1", "relu2"])
def test_a_fit_with_a_kernel_resumes_bit_for_bit(kernel):
    resumes(KernelBytes(), {"bits_per_byte", "n_eff", "n_eff@5%", "n_eff@95%", "s"}, kernel=kernel)


def test_all_arms_have_the_same_parameters():
    shapes = set()
    for objective, kind in ARMS:
        task = MaskKindBytes()
        model = task.start(seed=3, steps=1, options=all_options(task, objective=objective, kind=kind)).model
        shapes.add(tuple(float(p.detach().double().sum()) for p in model.parameters()))
    assert len(shapes) == 1


@arms
def test_a_prediction_sees_what_its_kind_says_and_nothing_that_it_must_tell(objective, kind):
    task = MaskKindBytes()
    options = all_options(task, objective=objective, kind=kind, layers=1)
    model = task.start(seed=0, steps=1, options=options).model.double()
    count = 15 if objective == "continuation" else 16
    tokens = torch.randint(256, (1, count), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    kind_of_layer, border = layer_kinds(options)[0]
    heads = 2 if kind_of_layer == "forward_backward" else None
    mask = attention_mask(kind_of_layer, count, prefix_lengths=border, num_heads=heads)
    visible = torch.ones(count, count).bool()
    visible = mask.attn_mask[0].any(0) if mask.attn_mask is not None else visible.tril() if mask.is_causal else visible
    for t in range(count):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 256
        moved = (model(changed) != before).any(-1)[0]
        assert torch.equal(moved, visible[:, t])
    if objective == "continuation":
        # The byte at t + 1 is told at t: nothing that is asked for is seen.
        assert not visible[:, 8:].triu(-7).any()


def test_questions():
    task = MaskKindBytes()
    bytes_ = torch.arange(32).view(2, 16)
    tokens, targets = _questions(bytes_, all_options(task), torch.Generator())
    assert torch.equal(tokens, bytes_[:, :-1])
    assert torch.equal(targets[:, 7:], bytes_[:, 8:])
    assert (targets[:, :7] == -1).all()
    options = all_options(task, objective="masked", mask_rate=0.25)
    bytes_ = torch.randint(256, (100, 64))
    tokens, targets = _questions(bytes_, options, torch.Generator().manual_seed(0))
    asked = targets >= 0
    assert asked.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (tokens[asked] == MASK).all()
    assert torch.equal(targets[asked], bytes_[asked])
    assert torch.equal(tokens[~asked], bytes_[~asked])


@pytest.mark.parametrize("objective", ["continuation", "masked"])
def test_the_loss_of_a_model_that_knows_nothing_is_eight_bits(objective):
    task = MaskKindBytes()
    options = all_options(task, objective=objective, kind="causal")
    fit = task.start(seed=0, steps=1, options=options)
    for parameter in fit.model.parameters():
        parameter.data.zero_()
    found = task.evaluate(fit, seed=0, split="test", options=options)
    assert found["bits_per_byte"] == pytest.approx(8, rel=1e-6)
    # Uniform causal weights: row i reads i + 1 keys, row 0 is left out.
    count = 15 if objective == "continuation" else 16
    assert found["n_eff"] == pytest.approx(sorted(range(2, count + 1))[(count - 2) // 2])
    kernel = KernelBytes()
    for name in ("softmax", "elu1"):
        options = all_options(kernel, kernel=name)
        fit = kernel.start(seed=0, steps=1, options=options)
        for parameter in fit.model.parameters():
            parameter.data.zero_()
        found = kernel.evaluate(fit, seed=0, split="test", options=options)
        assert found["bits_per_byte"] == pytest.approx(8, rel=1e-6)
        # Rows 8 to 15 of 16 read 9 to 16 keys.
        assert found["n_eff"] == pytest.approx(12.5, abs=0.51)
        assert found["s"] == pytest.approx(1, rel=1e-6)


@arms
def test_the_matrices_are_those_of_the_model(objective, kind):
    """With the first layer's output rebuilt from its matrix."""
    task = MaskKindBytes()
    options = all_options(task, objective=objective, kind=kind)
    model = task.start(seed=0, steps=1, options=options).model.double()
    tokens = torch.randint(256, (2, 15 if objective == "continuation" else 16))
    block, seen = model.blocks[0], []
    weights, visible = attention_matrices(model, tokens, options)[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights[~visible] == 0).all()
    attend = model.attends[0]
    block(model.embedding(tokens), lambda q, k, v: seen.append((v, attend(q, k, v))) or seen[0][1])
    torch.testing.assert_close(weights @ seen[0][0], seen[0][1])


def test_kernels_are_causal():
    query, key = torch.randn(2, 2, 3, 9, 4, dtype=torch.float64)
    scores = query @ key.transpose(-2, -1) / 2
    raw = {
        "softmax": scores.exp(),
        "relu2": scores.relu().square(),
        "elu1": (F.elu(query) + 1) @ (F.elu(key) + 1).transpose(-2, -1),
    }
    for kernel, weights in raw.items():
        lower = weights.tril()
        found, visible = causal_weights(kernel, query, key)
        torch.testing.assert_close(found, lower / lower.sum(-1, keepdim=True).clamp(min=1e-300))
        assert torch.equal(visible, torch.ones(9, 9).tril().bool())


def test_positions_are_told_only_where_they_are_asked_for():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (1, 6), generator=generator)
    mean = [lambda query, key, value: value.mean(2, keepdim=True).expand_as(value)]
    for positions in (0, 6):
        torch.manual_seed(0)
        model = ByteAttention(width=8, heads=2, attends=mean, positions=positions).double()
        # Attention that knows no order moves with its tokens.
        assert torch.allclose(model(tokens.flip(1)), model(tokens).flip(1)) == (positions == 0)


def test_splits_are_bytes_of_different_files():
    assert byte_split("train").dtype == torch.uint8
    assert len({len(byte_split(name)) for name in ("train", "validation", "test")}) == 3


@pytest.mark.trial
@pytest.mark.parametrize("name", ["attention/decoder_only", "attention/concentration_bytes"])
def test_trial_runs_at_ci_size(name, tmp_path):
    with Store(tmp_path) as store:
        outcome = run_trial(name, size="ci", store=store)
    assert len(outcome.arms) == (6 if name.endswith("only") else 3)
    for arm in outcome.arms:
        assert {"bits_per_byte", "n_eff"} <= arm.metrics.keys()


@pytest.mark.parametrize(
    ("task", "changes", "match"),
    [
        (MaskKindBytes(), {"kind": "full"}, "unknown kind 'full'; known: causal, prefix"),
        (MaskKindBytes(), {"objective": "mlm"}, "unknown objective 'mlm'; known: continuation, masked"),
        (MaskKindBytes(), {"kind": "bidirectional"}, "no meaning for the objective 'continuation'"),
        (MaskKindBytes(), {"objective": "masked", "kind": "prefix"}, "no meaning for the objective 'masked'"),
        (KernelBytes(), {"kernel": "cosine"}, "unknown kernel 'cosine'; known: softmax, elu1, relu2"),
    ],
)
def test_unknown_choices(task, changes, match):
    with pytest.raises(TrialError, match=match):
        task.start(seed=0, steps=1, options=all_options(task, **changes))
