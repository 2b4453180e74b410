"""ReRoPE on tiny random models of transformers: caches, padding, generation, removal, refusals."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from danlu.integrations.transformers import patch_rope  # noqa: E402
from danlu.integrations.transformers_rerope import _SETTINGS, _Settings  # noqa: E402

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "llama with yarn": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, rope_parameters=YARN)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=8)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=None)),
    # Half of the channels of a head are rotated.
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **SMALL,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        )
    ),
    # Every second layer does not rotate.
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(**SMALL, no_rope_layer_interval=2, use_sliding_window=False)
    ),
    # One layer with full attention, one with a window; one rotary module for both, and one per kind.
    "qwen2 with windows": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SMALL,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention"],
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SMALL, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        )
    ),
}
MIXED = ("qwen2 with windows", "gemma3")
families = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    # Random weights attend evenly, and the next token depends on the last one alone; larger ones make positions matter.
    for name, parameter in model.named_parameters():
        if any(f"{kind}_proj.weight" in name for kind in ("q", "k", "qkv", "o")):
            parameter.data.mul_(20)
        if "q_norm" in name:
            parameter.data.add_(5)
    return model


def patch(model, **options):
    slides = any(kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or [])
    return patch_rope(model, full_attention_only=slides, **options)


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@torch.no_grad()
def in_chunks(model, ids, sizes, **options):
    cache, outs = options.pop("cache", None), []
    for chunk in ids.split(sizes, dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True, **options)
        cache = out.past_key_values
        outs.append(out.logits)
    return torch.cat(outs, dim=1)


@families
def test_wide_window_is_the_unpatched_model(family):
    model, ids = make(family), tokens(24)
    plain = logits(model, ids)
    with patch(model, window=100):
        # What is left is the float32 angles of transformers.
        torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=1e-4)
    with patch(model, window=4):
        changed = logits(model, ids)
    torch.testing.assert_close(changed[:, :4], plain[:, :4], rtol=0, atol=1e-4)
    assert (changed[:, -1] - plain[:, -1]).abs().max() > 1e-3


def test_wide_window_is_the_unpatched_model_to_float64():
    """What is left otherwise are the float32 angles of transformers."""
    model, ids = make("llama"), tokens(24)
    rotary = model.model.rotary_emb

    def exact(x, position_ids):
        angles = position_ids[..., None] * rotary.inv_freq.double()
        return tuple(torch.cat((table, table), -1) for table in (angles.cos(), angles.sin()))

    rotary.forward = exact
    plain = logits(model, ids)
    with patch(model, window=100):
        torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=1e-10)


@families
def test_removal_restores_bitwise(family):
    model, ids = make(family, torch.float32), tokens(24)
    plain, state = logits(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._attn_implementation
    handle = patch(model, window=5)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert not torch.equal(logits(model, ids), plain)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, ids), plain)
    assert model.config._attn_implementation == implementation
    assert "danlu" not in repr(model).lower()
    assert not any(hasattr(module, _SETTINGS) for module in model.modules())
    with pytest.raises(RuntimeError, match="stop"), patch(model, window=5):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, ids), plain)


@families
@pytest.mark.parametrize("options", [{}, {"slope": 0.3}, {"logn": "post", "train_length": 6}])
def test_cache_equals_no_cache(family, options):
    """Token by token, in chunks, and with a static cache."""
    model, ids = make(family), tokens(20)
    with patch(model, window=5, **options):
        full = logits(model, ids)
        for sizes in ([1] * 20, [7, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1], [11, 9]):
            torch.testing.assert_close(in_chunks(model, ids, sizes), full, rtol=0, atol=1e-10)
            if family not in MIXED:
                static = transformers.StaticCache(config=model.config, max_cache_len=32)
                torch.testing.assert_close(in_chunks(model, ids, sizes, cache=static), full, rtol=0, atol=1e-10)


def test_log_n_sharpens_beyond_the_training_length():
    model, ids = make("llama"), tokens(24)
    with patch(model, window=5):
        plain = logits(model, ids)
    with patch(model, window=5, logn="post", train_length=12) as handle:
        assert handle.train_length == 12
        sharp = logits(model, ids)
    assert torch.equal(sharp[:, :12], plain[:, :12])
    assert (sharp[:, -1] - plain[:, -1]).abs().max() > 1e-3
    with patch(make("llama"), logn="post") as handle:
        assert handle.train_length == 32
    with patch(make("llama with yarn"), logn="post") as handle:
        assert (handle.train_length, handle.window) == (8, 16)


@families
@pytest.mark.parametrize("options", [{}, {"logn": "post", "train_length": 6}])
def test_padding_equals_no_padding(family, options):
    model, ids = make(family), tokens(15)
    batch = torch.cat((F.pad(ids, (6, 0)), tokens(21, seed=1)))
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # A rotary module of its own needs the positions of the tokens.
    given = {"position_ids": positions} if family == "gemma3" else {}
    with patch(model, window=5, **options):
        alone = logits(model, ids)
        together = logits(model, batch, attention_mask=mask, **given)
        torch.testing.assert_close(together[:1, 6:], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(together[1:], logits(model, batch[1:]), rtol=0, atol=1e-10)
        right = logits(model, F.pad(ids, (0, 6)), attention_mask=F.pad(torch.ones_like(ids), (0, 6)))
        torch.testing.assert_close(right[:, :15], alone, rtol=0, atol=1e-10)


def test_a_chunk_that_is_padded_on_the_right_stays_in_its_slots():
    model, ids = make("llama"), tokens(18)
    with patch(model, window=5), torch.no_grad():
        full = logits(model, ids)
        for cache in (None, transformers.StaticCache(config=model.config, max_cache_len=32)):
            first = model(ids[:, :10], use_cache=True, past_key_values=cache)
            mask = torch.cat((torch.ones(1, 18), torch.zeros(1, 3)), 1)
            chunk = F.pad(ids[:, 10:], (0, 3))
            second = model(chunk, attention_mask=mask, past_key_values=first.past_key_values)
            torch.testing.assert_close(second.logits[:, :8], full[:, 10:], rtol=0, atol=1e-10)


def test_packed_batches_and_masks_of_the_user():
    model = make("llama")
    parts = [tokens(9), tokens(14, seed=1)]
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    with patch(model, window=5):
        packed = logits(model, torch.cat(parts, 1), position_ids=positions, use_cache=False)
        alone = torch.cat([logits(model, part) for part in parts], 1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
        owner = torch.tensor([0] * 9 + [1] * 14)
        mask = (owner[:, None] == owner).tril()[None, None]
        given = logits(model, torch.cat(parts, 1), attention_mask=mask)
        torch.testing.assert_close(given, alone, rtol=0, atol=1e-10)
        lowest = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
        given = logits(model, torch.cat(parts, 1), attention_mask=lowest)
        torch.testing.assert_close(given, alone, rtol=0, atol=1e-10)
        with pytest.raises(TypeError, match="attn_mask must be bool with True = visible, or floating"):
            logits(model, torch.cat(parts, 1), attention_mask=mask.long())


@families
def test_generation_is_the_same_with_every_cache(family):
    model, ids = make(family), tokens(12)
    generate = partial(model.generate, max_new_tokens=12, do_sample=False)
    with patch(model, window=5):
        expected = generate(ids, use_cache=False)
        assert torch.equal(generate(ids), expected)
        assert torch.equal(generate(ids, cache_implementation="static", disable_compile=True), expected)
        assert torch.equal(generate(ids, prefill_chunk_size=5), expected)
        beams = generate(ids, num_beams=3)
        assert torch.equal(generate(ids, num_beams=3, use_cache=False), beams)
        padded = torch.cat((F.pad(ids, (4, 0)), tokens(16, seed=2)))
        mask = torch.ones_like(padded)
        mask[0, :4] = 0
        together = generate(padded, attention_mask=mask)
        assert torch.equal(together[:1, 4:], expected)
        static = generate(padded, attention_mask=mask, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, together)
        assert torch.equal(generate(padded, attention_mask=mask, num_beams=3)[:1, 4:], beams)
    assert not torch.equal(generate(ids), expected)


def test_trying_out_leaves_no_trace():
    model = make("llama")
    state = torch.get_rng_state()
    names = set(dict(model.named_modules()))
    patch_rope(model).remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert set(dict(model.named_modules())) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, ids = make("llama", torch.float32), tokens(24)
    with patch(model, window=5):
        exact = logits(model, ids)
    model = model.to(dtype)
    plain = logits(model, ids)
    with patch(model, window=100):
        assert (logits(model, ids) - plain).abs().max() < 0.05 * plain.abs().max()
    with patch(model, window=5):
        out = logits(model, ids)
        assert out.dtype == dtype
        assert (out - exact).abs().max() < 0.1 * exact.abs().max()


def test_default_window():
    with patch_rope(make("llama")) as handle:
        assert handle.window == 16


def test_masks_are_read_once_per_forward(monkeypatch):
    from danlu.integrations import transformers_rerope

    calls = []
    read = transformers_rerope._read
    monkeypatch.setattr(transformers_rerope, "_read", lambda *x: calls.append(1) or read(*x))
    model, ids = make("llama"), tokens(9, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with patch(model, window=5):
        logits(model, ids, attention_mask=mask)
    assert len(calls) == 1


def test_bidirectional_models_stay_so():
    """A model whose attention is not causal sees the future, with and without padding."""
    model, ids = make("llama"), tokens(12)
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    plain = logits(model, ids)
    with patch(model, window=100):
        torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=1e-4)
        padded = logits(model, F.pad(ids, (5, 0)), attention_mask=F.pad(torch.ones_like(ids), (5, 0)))
        torch.testing.assert_close(padded[:, 5:], plain, rtol=0, atol=1e-4)


def test_dropout_of_attention_in_training():
    model, ids = make("llama"), tokens(12)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with patch(model, window=5):
        plain = logits(model, ids)
        assert torch.equal(logits(model, ids), plain)
        model.train()
        first, second = logits(model, ids), logits(model, ids)
    assert not torch.equal(first, second)
    # The first token sees itself alone, with a weight of 0 or 2.
    assert first.isfinite().all()


def with_layers(kind):
    model = make("llama")
    model.config.layer_types = ["full_attention", kind]
    return model


def with_parameters(**parameters):
    model = make("llama")
    model.config.rope_parameters.update(parameters)
    return model


def without_tables():
    model = make("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, cos_sin: None
    return model


def tiny(kind, **options):
    return lambda: getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))


REFUSED = {
    "has no rotary position embedding": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2)
    ),
    "does not go through transformers' AttentionInterface": tiny("StableLm", **SMALL),
    "layers with a sliding window, .* full_attention_only=True leaves them alone": tiny(
        "Mistral", **SMALL, sliding_window=8
    ),
    "changes its frequencies with the length": tiny(
        "Llama", **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    "rope_type 'longrope' changes its frequencies": tiny(
        "Phi3",
        **{**SMALL, "max_position_embeddings": 64},
        sliding_window=None,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 32,
        },
    ),
    "does not rotate channels in halves": tiny("Cohere", **SMALL),
    "not rotate channels in halves": tiny("Glm", **SMALL, head_dim=8),
    "latent attention rotates a part of the keys after caching": tiny(
        "DeepseekV3",
        **{**SMALL, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "its scores are soft-capped": tiny("Gemma2", **SMALL, head_dim=8, sliding_window=4),
    "it has attention sinks": tiny("GptOss", **SMALL, head_dim=8, num_local_experts=2, sliding_window=4),
    "it has cross attention": lambda: transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(**{kind: {**SMALL, "head_dim": 8} for kind in ("encoder", "decoder")})
    ),
    "it has parts with configurations of their own; patch its language model": lambda: (
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**SMALL),
                vision_config=transformers.CLIPVisionConfig(
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    image_size=8,
                    patch_size=4,
                ),
            )
        )
    ),
    "it has layers of other kinds: chunked_attention": lambda: with_layers("chunked_attention"),
    "its positions have several kinds": lambda: with_parameters(mrope_section=[1, 1, 2]),
    "its attention could not be tried out": lambda: without_tables(),
    "patched already": lambda: patch_rope(make("llama")).model,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_cannot_be_patched_are_refused_with_the_reason(reason):
    model = REFUSED[reason]()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"cannot be patched: .*{reason}"):
        patch_rope(model)
    assert model.config._attn_implementation == before


def test_all_layers_with_a_window_are_refused():
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=8))
    with pytest.raises(ValueError, match="all of its layers have a sliding window"):
        patch_rope(model, full_attention_only=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"slope": -1.0}, ValueError, "slope must be in"),
        ({"method": "ntk"}, ValueError, "method must be one of 'rerope', got 'ntk'"),
        ({"logn": "train"}, ValueError, "logn must be one of 'post', got 'train'"),
        ({"logn": "post", "train_length": 1}, ValueError, "train_length must be at least 2"),
        ({"train_length": 8}, ValueError, "train_length is of use with logn only"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "must be a transformers model"),
    ],
)
def test_bad_options_leave_the_model_alone(options, error, match):
    model = make("llama")
    with pytest.raises(error, match=match):
        patch_rope(**{"model": model, **options})
    patch_rope(model).remove()


def test_what_attention_cannot_do_is_refused_when_it_is_asked_for():
    model = make("llama")
    attention = model.model.layers[0].self_attn
    handle = patch_rope(model, window=5)
    function = transformers.AttentionInterface()["danlu_rerope"]
    query = torch.zeros(1, 4, 3, 8, dtype=torch.float64)
    key = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not know the option 'softcap'"):
        function(attention, query, key, key, None, softcap=30.0)
    with pytest.raises(ValueError, match="does not know the option 's_aux'"):
        function(attention, query, key, key, None, s_aux=torch.zeros(4))
    assert isinstance(getattr(attention, _SETTINGS), _Settings)
    handle.remove()
    with pytest.raises(TypeError, match="this attention module is not patched"):
        function(attention, query, key, key, None)
