"""Stretched frequencies in tiny random models of transformers: what they equal, what is restored, what is refused."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from danlu.integrations.transformers import RopeExtension, extend_rope, patch_rope  # noqa: E402
from danlu.positions import rope_frequencies, scale_frequencies  # noqa: E402

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HALF = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32}
RULES = ["linear", "ntk-old", "ntk-aware", "ntk-fixed", "ntk-mixed", "by-parts"]


def build(kind: str, dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    # Gemma3Config is that of the model with pictures.
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(kind, kind) + "Config")(**{**HALF, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            # Random weights attend evenly; larger ones make a difference.
            parameter.data.mul_(10)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def rope(kind: str, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def tokens(rows: int = 2, length: int = 48) -> torch.Tensor:
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    return model(tokens(), **inputs).logits


@pytest.mark.parametrize(
    ("method", "peer"),
    [
        ("linear", rope("linear", factor=4.0)),
        ("ntk-old", {"rope_parameters": {"rope_type": "default", "rope_theta": 40000.0}}),
        ("ntk-aware", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0 * 4.0 ** (8 / 6)}}),
    ],
)
def test_equals_models_that_were_configured_so(method, peer):
    plain = build("Llama")
    before = logits(plain)
    expected = logits(build("Llama", **peer))
    assert (expected - before).abs().max() > 1e-2
    with extend_rope(plain, method=method, factor=4.0):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-3, atol=2e-4)
    assert torch.equal(logits(plain), before)


def test_interpolation_equals_positions_over_the_factor():
    model = build("Llama")
    mask = torch.ones(2, 48, dtype=torch.int64)
    positions = (torch.arange(48) / 4.0).expand(2, -1)
    expected = logits(model, position_ids=positions, attention_mask=mask)
    with extend_rope(model, method="linear", factor=4):
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", RULES)
def test_frequencies_are_those_of_the_rule(method):
    model = build("Llama")
    handle = extend_rope(model, method=method, factor=3.0)
    options = {"train_length": 32} if method == "by-parts" else {}
    expected = scale_frequencies(rope_frequencies(8), method=method, factor=3.0, **options)
    assert torch.equal(handle.frequencies, expected)
    assert torch.equal(model.model.rotary_emb.inv_freq, expected.float())
    handle.remove()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", rope("linear", factor=2.0)),
        ("Llama", rope("yarn", factor=2.0, original_max_position_embeddings=16)),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Mistral", {"sliding_window": None}),
        ("Phi3", {"pad_token_id": 0, **rope("default", partial_rotary_factor=0.5)}),
        ("GPTNeoX", {}),
        ("Cohere", {"pad_token_id": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("rope_parameters", {}).get("rope_type", "")),
)
def test_in_place_and_back_bit_for_bit(kind, changes):
    model = build(kind, **changes)
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    handle = extend_rope(model, factor=4.0)
    assert isinstance(handle, RopeExtension)
    extended = logits(model)
    assert (extended - before).abs().max() > 1e-4
    # Nothing that is saved has changed.
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    handle.remove()
    handle.remove()
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys()
    assert all(after[name] is value for name, value in buffers.items())
    assert torch.equal(logits(model), before)
    # And again.
    with extend_rope(model, factor=4.0):
        assert torch.equal(logits(model), extended)


def test_factors_multiply_on_a_model_that_is_stretched_already():
    once, twice = build("Llama", **rope("linear", factor=8.0)), build("Llama", **rope("linear", factor=2.0))
    with extend_rope(twice, method="linear", factor=4.0):
        torch.testing.assert_close(logits(twice), logits(once), rtol=1e-3, atol=2e-4)


def test_the_cache_is_exact_and_factor_1_is_nothing():
    model = build("Llama", torch.float64)
    with extend_rope(model, factor=4.0):
        full = logits(model)
        cache, steps = None, []
        for i in range(0, 48, 12):
            with torch.no_grad():
                out = model(tokens()[:, i : i + 12], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-6, atol=1e-6)
        answers = [model.generate(tokens(), max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
        assert torch.equal(*answers)
    before = logits(model)
    with extend_rope(model, method="linear", factor=1.0):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_layers_by_kind_and_local_ones_stay():
    layers = ["sliding_attention", "full_attention"]
    model = build("Gemma3", layer_types=layers, sliding_window=8, head_dim=8, pad_token_id=0)
    rotary = model.model.rotary_emb
    local, full = rotary.sliding_attention_inv_freq.clone(), rotary.full_attention_inv_freq.clone()
    before = logits(model)
    with extend_rope(model, factor=4.0, method="linear"):
        assert torch.equal(rotary.sliding_attention_inv_freq, local)
        torch.testing.assert_close(rotary.full_attention_inv_freq, full / 4, rtol=1e-6, atol=0)
        assert (logits(model) - before).abs().max() > 1e-4
    assert torch.equal(logits(model), before)


def test_a_model_that_was_cast_gets_exact_frequencies_and_its_own_ones_back():
    model = build("Llama", torch.bfloat16)
    rotary = model.model.rotary_emb
    held = rotary.inv_freq.clone()
    with extend_rope(model, factor=4.0) as handle:
        assert rotary.inv_freq.dtype == torch.float32
        assert torch.equal(handle.frequencies, rope_frequencies(8, method="ntk-mixed", factor=4.0))
    assert torch.equal(rotary.inv_freq, held)
    assert rotary.inv_freq.dtype == held.dtype
    # The original goes where the model goes.
    handle = extend_rope(build("Llama"), factor=4.0)
    moved = handle.model.double()
    handle.remove()
    assert moved.model.rotary_emb.inv_freq.dtype == torch.float64
    torch.testing.assert_close(moved.model.rotary_emb.inv_freq, rope_frequencies(8), rtol=1e-6, atol=0)


def test_a_cast_that_cannot_be_mended_is_refused():
    model = build("Llama", **rope("linear", factor=2.0))
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    with pytest.raises(ValueError, match=r"its frequencies were cast to torch\.bfloat16; load the model in that dtype"):
        extend_rope(model, factor=2.0)


def test_saving_while_extended_saves_the_model_as_it_was(tmp_path):
    model = build("Llama")
    before = logits(model)
    with extend_rope(model, factor=4.0):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()), before)


def test_extend_then_patch():
    model = build("Llama")
    before = logits(model)
    with extend_rope(model, factor=4.0):
        extended = logits(model)
        with patch_rope(model, window=1000):
            torch.testing.assert_close(logits(model), extended, rtol=1e-3, atol=2e-4)
            with pytest.raises(ValueError, match=r"patched by patch_rope, or .* extend first, then patch"):
                extend_rope(model, factor=2.0)
    assert torch.equal(logits(model), before)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4))


LONG = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (gpt2, "GPT2LMHeadModel cannot be extended: it has no rotary frequencies"),
        (lambda: build("Llama", **rope("dynamic", factor=2.0)), r"'dynamic' stretches its frequencies itself.*25104"),
        (lambda: build("Phi3", pad_token_id=0, **rope("longrope", **LONG)), "'longrope' exchanges its frequencies"),
        (lambda: build("Mistral", sliding_window=8), "layers with a sliding window"),
        (lambda: build("Gemma2", sliding_window=8, head_dim=8, pad_token_id=0), "and they share the frequencies"),
    ],
    ids=["none", "dynamic", "longrope", "sliding", "mixed"],
)
def test_what_cannot_work_is_refused_and_left_alone(make, match):
    model = make()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.raises(ValueError, match=match):
        extend_rope(model, factor=2.0)
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_dynamic_of_transformers_leaves_cached_keys_behind():
    # Why it is refused: text that grows in the cache is not the text read at once.
    model = build("Llama", torch.float64, **rope("dynamic", factor=2.0))
    full = logits(copy.deepcopy(model))
    with torch.no_grad():
        cache = model(tokens()[:, :30], use_cache=True).past_key_values
        rest = model(tokens()[:, 30:], past_key_values=cache).logits
    assert (rest - full[:, 30:]).abs().max() > 1e-3


def test_extending_twice_and_bad_options():
    model = build("Llama")
    handle = extend_rope(model, factor=2.0)
    with pytest.raises(ValueError, match="it is extended already; remove the first extension"):
        extend_rope(model, factor=2.0)
    handle.remove()
    for options, error, match in (
        ({"factor": 0.0}, ValueError, "factor must be in"),
        ({"factor": 2.0, "method": "default"}, ValueError, "method must be one of 'linear'"),
        ({"factor": 2.0, "method": "ntk"}, ValueError, "method must be one of"),
        ({"factor": 2.0, "mixed_power": -0.5}, ValueError, "mixed_power must be in"),
        ({"factor": 2.0, "train_length": 8}, ValueError, "train_length is of use with method='by-parts', dynamic or"),
        ({"step": 8}, ValueError, "step is an option of dynamic=True, got 8 without it"),
        ({"dynamic": 1}, TypeError, "dynamic must be a bool, got int"),
        ({"dynamic": True, "factor": 0.5}, ValueError, "factor must be in"),
        ({"dynamic": True, "step": 0}, ValueError, "step must be at least 1, got 0"),
        ({"dynamic": True, "mixed_power": -0.5}, ValueError, "mixed_power must be in"),
        ({"dynamic": True, "train_length": 0}, ValueError, "train_length must be at least 1, got 0"),
        ({"logn": "train"}, ValueError, "logn must be one of 'post'"),
    ):
        with pytest.raises(error, match=match):
            extend_rope(model, **options)
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        extend_rope(torch.nn.Linear(2, 2), factor=2.0)
