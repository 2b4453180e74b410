"""The audit finds every planted hazard at its place, is silent on clean models, and leaves no trace."""

import pytest
import torch
from planted import BODY, CLEAN, PLANTED, WIDTH, Net, half_softmax, mse, part
from torch import nn

from danlu.precision import Finding, audit_precision


def example() -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_hazards_are_found_and_named(name):
    make, loss_fn, scale, expected = PLANTED[name]
    findings = audit_precision(Net(make(), scale), example(), torch.float16, loss_fn=loss_fn)
    found = {(one.module, one.kind): one.severity for one in reversed(findings)}
    assert {key: found.get(key) for key in expected} == expected, "\n".join(map(str, findings))
    # Nothing is said of the innocent modules before the hazard.
    assert all(one.module != "first" for one in findings) or ("first" in {module for module, _ in expected})


def test_there_are_enough_planted_and_clean_models():
    assert len(PLANTED) >= 12
    assert len(CLEAN) >= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CLEAN)
def test_clean_models_are_clean(name, dtype):
    make, loss_fn = CLEAN[name]
    torch.manual_seed(0)
    assert audit_precision(make(), example(), dtype, loss_fn=loss_fn) == []


def test_bfloat16_has_the_range_but_not_the_digits():
    for name, kinds in {
        "subtract_mask": set(),
        "fill_mask": set(),
        "norm_with_eps": set(),
        "half_softmax": {"softmax"},
        "half_positions": {"positions"},
        "large_activations": set(),
    }.items():
        make, loss_fn, scale, _ = PLANTED[name]
        findings = audit_precision(Net(make(), scale), example(), torch.bfloat16, loss_fn=loss_fn)
        assert {one.kind for one in findings if one.module in (BODY, "first")} == kinds, name


def test_half_model_without_autocast():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).half()
    findings = audit_precision(model, example().half(), torch.float16, autocast=False)
    assert {(one.module, one.kind, one.operation) for one in findings} == {
        ("0", "parameter", "weight"),
        ("0", "parameter", "bias"),
        ("1", "parameter", "weight"),
        ("1", "parameter", "bias"),
        ("1", "buffer", "running_mean"),
        ("1", "buffer", "running_var"),
    }


def test_errors_come_first_and_once():
    class Both(nn.Module):
        def forward(self, x):
            for _ in range(3):
                x = x.softmax(-1) + 1e-12
            return x

    findings = audit_precision(Net(Both()), example(), torch.float16)
    assert [(one.kind, one.severity) for one in findings] == [("eps", "error"), ("softmax", "warning")]
    assert str(findings[0]) == "error    eps          body.part: the constant 1e-12 rounds to 0 in float16 (add)"


def test_batches_of_every_form_and_a_loss_of_the_model():
    class Two(nn.Module):
        def forward(self, x, y):
            return (x.half() - y.half()).square().mean()

    x = example()
    for batch in ({"x": x, "y": x}, (x, x), [x, x]):
        kinds = {(one.module, one.kind, one.severity) for one in audit_precision(Two(), batch, torch.float16)}
        assert ("(loss)", "loss", "error") in kinds


def test_rounded_sums_are_information_only():
    findings = audit_precision(Net(part(lambda x: x.mean(-1, keepdim=True).expand(-1, WIDTH))()), example())
    assert [(one.kind, one.severity) for one in findings] == [("reduction", "info")]


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    audit_precision(model, example(), torch.float16, loss_fn=mse)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_mistake_of_the_model_is_not_a_hazard_and_the_hooks_go():
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        audit_precision(model, torch.ones(2, 4))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("model", torch.ones(1)), TypeError, "model must be a torch.nn.Module, got str"),
        ((nn.Linear(1, 1), torch.ones(1), torch.float32), TypeError, "dtype must be torch.float16 or torch.bfloat16"),
        ((nn.Linear(1, 1), torch.ones(1), "half"), TypeError, "dtype must be torch.float16 or torch.bfloat16"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        audit_precision(*arguments)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bert_has_no_errors(implementation, dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attn_implementation=implementation,
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    ids = torch.randint(50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    findings = audit_precision(model, batch, dtype)
    assert [one for one in findings if one.severity == "error"] == []


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_decoders_are_clean(kind, implementation, dtype):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "Llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, attn_implementation=implementation, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[kind])(config)
    ids = torch.randint(50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    assert audit_precision(model, {"input_ids": ids, "attention_mask": mask, "labels": ids}, dtype) == []


def test_finding_is_plain():
    assert part(half_softmax)().forward(torch.zeros(2)).tolist() == [0.5, 0.5]
    assert Finding("a", "eps", "error", "add", "m") == Finding("a", "eps", "error", "add", "m")
