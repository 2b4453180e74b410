"""Losses in the Trainer and ReRoPE on tiny random models of transformers."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from danlu.integrations.transformers import patch_rope, token_loss  # noqa: E402
from danlu.losses import tailr_loss  # noqa: E402

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, num_key_value_heads=2)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)
    ),
}
families = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    # Random weights attend evenly; larger ones make positions matter.
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(20)
    return model


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@families
def test_wide_window_is_the_unpatched_model(family):
    model, ids = make(family), tokens(24)
    plain = logits(model, ids)
    with patch_rope(model, window=100):
        # What is left is the float32 angles of transformers.
        torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=1e-4)
    with patch_rope(model, window=4):
        changed = logits(model, ids)
    torch.testing.assert_close(changed[:, :4], plain[:, :4], rtol=0, atol=1e-4)
    assert (changed[:, -1] - plain[:, -1]).abs().max() > 1e-3


@families
def test_removal_restores_bitwise(family):
    model, ids = make(family, torch.float32), tokens(24)
    plain, state = logits(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._attn_implementation
    handle = patch_rope(model, window=5)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert not torch.equal(logits(model, ids), plain)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, ids), plain)
    assert model.config._attn_implementation == implementation
    assert "danlu" not in repr(model).lower()
    with pytest.raises(RuntimeError, match="stop"), patch_rope(model, window=5):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, ids), plain)


@families
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_cache_equals_no_cache_token_by_token(family, slope):
    model, ids = make(family), tokens(20)
    with patch_rope(model, window=5, slope=slope), torch.no_grad():
        full = model(ids).logits
        cache, steps = None, []
        for chunk in ids.split([7, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1], dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=1e-10)


@families
def test_left_padding_equals_no_padding(family):
    model, ids = make(family), tokens(15)
    padded = F.pad(ids, (6, 0))
    batch = torch.cat((padded, tokens(21, seed=1)))
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    with patch_rope(model, window=5):
        alone = logits(model, ids)
        together = logits(model, batch, attention_mask=mask)
        torch.testing.assert_close(together[:1, 6:], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(together[1:], logits(model, batch[1:]), rtol=0, atol=1e-10)
        right = logits(model, F.pad(ids, (0, 6)), attention_mask=F.pad(torch.ones_like(ids), (0, 6)))
        torch.testing.assert_close(right[:, :15], alone, rtol=0, atol=1e-10)


@families
def test_generation_is_the_same_with_every_cache(family):
    model, ids = make(family), tokens(12)
    generate = partial(model.generate, max_new_tokens=12, do_sample=False)
    with patch_rope(model, window=5):
        expected = generate(ids, use_cache=False)
        assert torch.equal(generate(ids), expected)
        assert torch.equal(generate(ids, cache_implementation="static", disable_compile=True), expected)
        beams = generate(ids, num_beams=3)
        assert torch.equal(generate(ids, num_beams=3, use_cache=False), beams)
        padded = torch.cat((F.pad(ids, (4, 0)), tokens(16, seed=2)))
        mask = torch.ones_like(padded)
        mask[0, :4] = 0
        together = generate(padded, attention_mask=mask)
        assert torch.equal(together[:1, 4:], expected)
        static = generate(padded, attention_mask=mask, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, together)


def test_default_window_and_partial_rotation():
    with patch_rope(make("llama")) as handle:
        assert handle.window == 16
    config = transformers.Phi3Config(
        **SMALL, num_key_value_heads=2, pad_token_id=0, sliding_window=None, partial_rotary_factor=0.5
    )
    model, ids = transformers.Phi3ForCausalLM(config).double().eval(), tokens(20)
    plain = logits(model, ids)
    with patch_rope(model, window=100):
        torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=1e-4)


REFUSED = {
    "has no rotary position embedding": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2)
    ),
    "sliding window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)
    ),
    "changes its frequencies with the length": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    ),
    "does not rotate channels in halves": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**SMALL, num_key_value_heads=2)
    ),
    "patched already": lambda: patch_rope(make("llama")).model,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_cannot_be_patched_are_refused_with_the_reason(reason):
    with pytest.raises(ValueError, match=reason):
        patch_rope(REFUSED[reason]())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"slope": -1.0}, ValueError, "slope must be in"),
        ({"method": "ntk"}, ValueError, "method must be one of 'rerope', got 'ntk'"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "must be a transformers model"),
    ],
)
def test_bad_options_leave_the_model_alone(options, error, match):
    model = make("llama")
    with pytest.raises(error, match=match):
        patch_rope(**{"model": model, **options})
    patch_rope(model).remove()


def test_token_loss_shifts_and_divides():
    compute = token_loss(partial(tailr_loss, gamma=0.3))
    scores, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, 3] = -100
    expected = tailr_loss(scores[:, :-1], labels[:, 1:], gamma=0.3)
    torch.testing.assert_close(compute({"logits": scores}, labels), expected)
    torch.testing.assert_close(compute({"logits": scores}, labels, num_items_in_batch=torch.tensor(14)), expected / 2)
    aligned = token_loss(tailr_loss, shift=False)
    torch.testing.assert_close(aligned({"logits": scores[:, 0]}, labels[:, 0]), tailr_loss(scores[:, 0], labels[:, 0]))
    with pytest.raises(TypeError, match="loss must be callable"):
        token_loss("tailr")


def test_accumulation_in_the_trainer_equals_one_batch(tmp_path):
    """Four micro-batches of unequal numbers of labels give the weights of one batch of all."""

    def rows():
        for i in range(8):
            labels = tokens(10, seed=i)[0]
            labels[: i + 1] = -100
            yield {"input_ids": tokens(10, seed=i)[0], "labels": labels}

    def trained(size: int, accumulation: int):
        model = make("llama", torch.float32)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
        )
        data = list(rows())
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, compute_loss_func=token_loss(partial(tailr_loss, gamma=0.3))
        )
        trainer.train()
        return [p.detach() for p in model.parameters()]

    start = [p.detach() for p in make("llama", torch.float32).parameters()]
    one, four = trained(8, 1), trained(2, 4)
    assert max((a - b).abs().max() for a, b in zip(one, start, strict=True)) > 1e-3
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
