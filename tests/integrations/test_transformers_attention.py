"""Simplex maps as attention of tiny random models of transformers."""

from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers")

from danlu.integrations.transformers_attention import _attend, register_attention  # noqa: E402
from danlu.simplex import entmax, entmax15, softmax, sparsemax  # noqa: E402

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NAMES = [
    f"danlu_{name}"
    for name in ("softmax", "sparsemax", "entmax15", "entmax125", "sparse_softmax", "taylor_softmax", "perturb_max")
]


def llama(implementation: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=32)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            # Random weights attend evenly; larger ones make a difference.
            parameter.data.mul_(20)
    model.set_attn_implementation(implementation)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(0))


def padding() -> torch.Tensor:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
def test_softmax_equals_the_model(padded):
    register_attention("danlu_softmax")
    mask = padding() if padded else None
    expected = llama("sdpa")(tokens(), attention_mask=mask).logits
    found = llama("danlu_softmax")(tokens(), attention_mask=mask).logits
    rows = (1, slice(4, None)) if padded else slice(None)
    torch.testing.assert_close(found[rows], expected[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_padding_decoding_and_weights(name):
    register_attention(name)
    model = llama(name)
    batch = model(tokens(), attention_mask=padding(), output_attentions=True)
    alone = model(tokens()[1:, 4:]).logits
    # Positions are relative, so left padding changes nothing.
    torch.testing.assert_close(batch.logits[1, 4:], alone[0], rtol=1e-6, atol=1e-6)
    weights = batch.attentions[0]
    assert weights.shape == (2, 4, 9, 9)
    sums = weights.sum(-1)
    torch.testing.assert_close(sums[0], torch.ones_like(sums[0]))
    assert (weights[0].triu(1) == 0).all()
    assert (weights[1, :, 4:, :4] == 0).all()
    # A padded query sees no key.
    assert (weights[1, :, :4] == 0).all()
    grown = model.generate(tokens()[:1], max_new_tokens=4, do_sample=False)
    whole = model(grown[:, :-1]).logits.argmax(-1)
    assert torch.equal(grown[:, 9:], whole[:, 8:])
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sparse_weights_are_sparse_and_a_bidirectional_model_works():
    register_attention("danlu_sparsemax")
    weights = llama("danlu_sparsemax")(tokens(), output_attentions=True).attentions[0]
    assert (weights[:, :, -1] == 0).double().mean() > 0.3
    config = transformers.BertConfig(**SMALL, max_position_embeddings=32)
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.set_attn_implementation("danlu_softmax")
    register_attention("danlu_softmax")
    found = model(tokens(), attention_mask=padding()).last_hidden_state
    model.set_attn_implementation("eager")
    expected = model(tokens(), attention_mask=padding()).last_hidden_state
    torch.testing.assert_close(found[1, 4:], expected[1, 4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_decodes_the_same_tokens(padded):
    """Its first pass has more keys than queries, and no mask if nothing is padded."""
    register_attention("danlu_entmax15")
    model = llama("danlu_entmax15")
    options = {"attention_mask": padding() if padded else None, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(), **options)
    assert torch.equal(model.generate(tokens(), cache_implementation="static", **options), expected)


def test_a_model_with_a_position_bias_and_back_again():
    """T5: encoder, decoder and cross attention, with a bias that is added to the scores."""
    register_attention("danlu_softmax")
    register_attention("danlu_sparsemax")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.data.normal_(0, 3)

    def logits(implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        return model(input_ids=tokens(), attention_mask=padding(), decoder_input_ids=tokens()).logits

    eager = logits("eager")
    torch.testing.assert_close(logits("danlu_softmax"), eager, rtol=1e-9, atol=1e-9)
    assert (logits("danlu_sparsemax") - eager).abs().max() > 1e-2
    assert torch.equal(logits("eager"), eager)


def test_a_map_of_your_own():
    function = register_attention("mine", partial(entmax, alpha=1.7))
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    module = torch.nn.Module()
    module.is_causal = False
    out, weights = function(module, q, k, v, None)
    torch.testing.assert_close(weights, entmax(q @ k.mT / 2, 1.7))
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


def test_masks_groups_softcap_and_dropout():
    module = torch.nn.Module().train()
    module.is_causal = True
    q = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 5, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64)
    visible = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    visible[0, 0, 1] = False
    out, weights = _attend(entmax15, module, q, k, v, visible, scaling=0.5)
    assert (weights[0, :, 1] == 0).all()
    assert (out[0, 1] == 0).all()
    dense = (q @ k.repeat_interleave(2, 1).mT * 0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(weights, entmax15(dense))
    torch.testing.assert_close(out, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2))
    additive = torch.zeros(2, 1, 3, 5).masked_fill(~visible, torch.finfo(torch.float32).min)
    torch.testing.assert_close(_attend(entmax15, module, q, k, v, additive, scaling=0.5)[1], weights)
    # Without a mask the later keys are empty slots of a static cache.
    causal = _attend(softmax, module, q, k, v, None)[1]
    assert torch.equal(causal > 0, torch.ones(2, 4, 3, 5, dtype=torch.bool).tril())
    # What the call says goes before what the module says.
    assert (_attend(softmax, module, q, k, v, None, is_causal=False)[1] > 0).all()
    bias = torch.randn(1, 4, 3, 7, dtype=torch.float64)
    biased = _attend(entmax15, module, q, k, v, visible, scaling=0.5, position_bias=bias)[1]
    torch.testing.assert_close(biased, entmax15(dense + bias[..., :5]))
    assert (_attend(softmax, module, q[:, :, :1], k, v, None)[1] > 0).all()
    capped = _attend(sparsemax, module, 100 * q, k, v, None, softcap=0.1)[1]
    assert torch.equal(capped > 0, causal > 0)
    dropped = _attend(softmax, module, q, k, v, None, dropout=0.5)[1]
    assert (dropped == 0).double().mean() > 0.4
    assert torch.equal(_attend(softmax, module.eval(), q, k, v, None, dropout=0.5)[1], causal)
    half = _attend(entmax15, module, q.bfloat16(), k.bfloat16(), v.bfloat16(), visible)[0]
    assert half.dtype == torch.bfloat16


def test_errors():
    with pytest.raises(ValueError, match=r"name must be one of danlu_entmax125, .* or come with a map, got 'entmax'"):
        register_attention("entmax")
    with pytest.raises(TypeError, match="map must be callable, got int"):
        register_attention("mine", 3)
    q = torch.randn(1, 1, 2, 4)
    for name in ("s_aux", "sinks"):
        with pytest.raises(ValueError, match="attention sinks"):
            _attend(softmax, torch.nn.Module(), q, q, q, None, **{name: torch.zeros(1)})
