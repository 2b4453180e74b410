"""Prefix language models in transformers: two forms of one mask, generation, encoders by heads and layers."""

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from danlu.attention import attention_mask  # noqa: E402
from danlu.diagnostics import attention_sparsity  # noqa: E402
from danlu.integrations.transformers import AttentionProbe  # noqa: E402
from danlu.integrations.transformers_prefix import (  # noqa: E402
    PrefixCollator,
    prefix_prompt,
    register_split_attention,
)

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
}
NAMES = ["danlu_prefix", "danlu_forward_backward", "danlu_alternate"]
FEATURES = [
    {"input_ids": [3, 7, 1, 30, 2, 2, 19, 4, 11], "prefix_length": 4},
    {"input_ids": [5, 6, 8, 9, 12, 31], "prefix_length": 6},
    {"input_ids": [22, 4, 4, 17, 9, 1, 2], "prefix_length": 0},
]


@pytest.fixture(autouse=True)
def _registered():
    for name in NAMES:
        register_split_attention(name)


def decoder(family: str = "llama", attention: str = "danlu_prefix", **changes) -> nn.Module:
    torch.manual_seed(0)
    config, model = DECODERS[family]
    given = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, **changes}
    made = model(config(**given, attn_implementation=attention, eos_token_id=None)).double().eval()
    for name, parameter in made.named_parameters():
        # Random weights attend evenly; larger ones make a difference.
        if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
            parameter.data.mul_(10)
    return made


def encoder(attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, max_position_embeddings=64, attn_implementation=attention)
    return transformers.BertModel(config, add_pooling_layer=False).double().eval()


def batches(side: str, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    options = {"pad_token_id": 0, "padding_side": side}
    return (
        PrefixCollator(**options)(FEATURES),
        PrefixCollator(**options, form="mask", mask_dtype=dtype)(FEATURES),
    )


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), [p.grad.clone() for p in model.parameters()]


# ---- the collator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches(side):
    lengths, mask = batches(side)
    assert torch.equal(lengths["input_ids"], mask["input_ids"])
    assert torch.equal(lengths["labels"], mask["labels"])
    assert lengths["input_ids"].shape == (3, 9)
    for i, feature in enumerate(FEATURES):
        text, prefix = feature["input_ids"], feature["prefix_length"]
        start = 9 - len(text) if side == "left" else 0
        inside = range(start, start + len(text))
        assert lengths["input_ids"][i, inside].tolist() == text
        assert lengths["attention_mask"][i].tolist() == [int(j in inside) for j in range(9)]
        assert lengths["prefix_lengths"][i] == start + prefix
        wanted = [text[j - start] if j in inside and j >= start + max(prefix, 1) else -100 for j in range(9)]
        assert lengths["labels"][i].tolist() == wanted
        for row in inside:
            sees = [j in inside and (j <= row or max(j, row) < start + prefix) for j in range(9)]
            assert (mask["attention_mask"][i, 0, row] == 0).tolist() == sees
    assert PrefixCollator(pad_token_id=0, pad_to_multiple_of=8)(FEATURES)["input_ids"].shape == (3, 16)
    tensors = [{**feature, "input_ids": torch.tensor(feature["input_ids"])} for feature in FEATURES]
    assert torch.equal(PrefixCollator(pad_token_id=0, padding_side=side)(tensors)["labels"], lengths["labels"])


@pytest.mark.parametrize(
    ("options", "features", "error", "match"),
    [
        ({"pad_token_id": -1}, FEATURES, ValueError, "pad_token_id must be at least 0"),
        ({"padding_side": "both"}, FEATURES, ValueError, "padding_side must be one of 'right', 'left'"),
        ({"form": "ids"}, FEATURES, ValueError, "form must be one of 'lengths', 'mask'"),
        ({"pad_to_multiple_of": 0}, FEATURES, ValueError, "pad_to_multiple_of must be at least 1"),
        ({"mask_dtype": torch.int64}, FEATURES, TypeError, "mask_dtype must be a floating-point dtype"),
        ({}, [], ValueError, "at least one feature"),
        ({}, [{"input_ids": [1], "prefix_length": 2}], ValueError, "at most the 1 tokens of its text, got 2"),
        ({}, [{"input_ids": [1], "prefix_length": -1}], ValueError, "prefix_length must be at least 0"),
        ({}, [{"input_ids": [1], "prefix_length": 0.5}], TypeError, "prefix_length must be an int"),
        ({}, [{"input_ids": [], "prefix_length": 0}], ValueError, r"shape \(L,\) with L >= 1"),
        ({}, [{"input_ids": [[1]], "prefix_length": 0}], ValueError, r"got shape \(1, 1\)"),
        ({}, [{"input_ids": [1], "prefix_length": 0, "labels": [1]}], ValueError, "no other keys, got .*'labels'"),
        ({}, [{"input_ids": [1]}], ValueError, "must have input_ids and prefix_length"),
    ],
)
def test_bad_features(options, features, error, match):
    with pytest.raises(error, match=match):
        PrefixCollator(**{"pad_token_id": 0, **options})(features)


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_lengths_and_masks_say_the_same(family, side):
    """Loss, logits and all gradients: split attention beside transformers' own under the dense mask."""
    lengths, mask = batches(side)
    loss, logits, grads = gradients(decoder(family), lengths)
    dense_loss, dense_logits, dense_grads = gradients(decoder(family, "sdpa"), mask)
    keep = lengths["attention_mask"].bool()
    torch.testing.assert_close(loss, dense_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits[keep], dense_logits[keep], rtol=1e-10, atol=1e-12)
    for one, two in zip(grads, dense_grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    eager = decoder(family, "eager")(**mask)
    # Its softmax is in float32.
    torch.testing.assert_close(eager.loss, loss, rtol=1e-6, atol=0)
    assert eager.logits.isfinite().all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_text_is_the_text_alone(side):
    model = decoder()
    together = model(**batches(side)[0])
    losses, counts = [], []
    for i, feature in enumerate(FEATURES):
        batch = PrefixCollator(pad_token_id=0)([feature])
        alone = model(**batch)
        count = len(feature["input_ids"])
        inside = slice(9 - count, 9) if side == "left" else slice(0, count)
        # The model's rotations are in float32, and padding on the left moves their positions.
        torch.testing.assert_close(together.logits[i, inside], alone.logits[0], rtol=1e-5, atol=1e-6)
        counts.append(int((batch["labels"] >= 0).sum()))
        losses.append(alone.loss.item() if counts[-1] else 0.0)
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert together.loss.item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_sees_ahead_in_its_prefix_and_nowhere_else(name):
    model = decoder(attention=name, num_hidden_layers=4)
    tokens = torch.arange(1, 10)[None]
    before = model(tokens, prefix_lengths=torch.tensor([4])).logits
    for t in range(9):
        changed = tokens.clone()
        changed[0, t] += 20
        moved = (model(changed, prefix_lengths=torch.tensor([4])).logits != before).any(-1)[0]
        assert moved.tolist() == [i >= t or (i < 4 and t < 4) for i in range(9)]
    causal = decoder(attention="sdpa", num_hidden_layers=4)(tokens).logits
    torch.testing.assert_close(model(tokens, prefix_lengths=0).logits, causal, rtol=1e-10, atol=1e-12)
    assert (before - causal).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_encoders_equal_the_dense_mask(name, padded):
    """With the masks as modules of four axes in the stock attention, layer by layer."""
    model, stock = encoder(name), encoder("sdpa")
    tokens = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    shown = torch.ones(2, 7).bool()
    if padded:
        shown[1, slice(0, 3) if padded == "left" else slice(4, 7)] = False
    found = model(tokens, attention_mask=shown.long())[0]
    for i, layer in enumerate(stock.encoder.layer):
        kind = {"danlu_prefix": "bidirectional", "danlu_forward_backward": "forward_backward"}.get(name)
        kind = kind or ("backward" if i % 2 else "causal")
        heads = 4 if kind == "forward_backward" else None
        pairs = attention_mask(kind, 7, num_heads=heads, lengths=torch.tensor([7, 7])).attn_mask
        pairs = pairs.expand(2, -1, 7, 7) & shown[:, None, None]
        layer.attention.self.register_forward_pre_hook(
            lambda module, args, kwargs, pairs=pairs: (args[:1], {**kwargs, "attention_mask": pairs}), with_kwargs=True
        )
    torch.testing.assert_close(found[shown], stock(tokens)[0][shown], rtol=1e-10, atol=1e-12)
    if name != "danlu_prefix":
        assert (found - encoder("sdpa")(tokens, attention_mask=shown.long())[0])[shown].abs().max() > 1e-3


def test_half_precision_and_checkpointing():
    lengths, _ = batches("left")
    exact = decoder()(**lengths)
    half = decoder().bfloat16()(**lengths)
    assert half.logits.dtype == torch.bfloat16
    keep = lengths["attention_mask"].bool()
    torch.testing.assert_close(half.logits[keep].double(), exact.logits[keep], rtol=0.1, atol=0.05)
    plain, model = decoder().train(), decoder().train()
    model.gradient_checkpointing_enable()
    for one, two in zip(gradients(plain, lengths)[2], gradients(model, lengths)[2], strict=True):
        torch.testing.assert_close(one, two)


def test_the_trainer(tmp_path):
    model = decoder().float().train()
    start = model(**batches("right")[0]).loss.item()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    collator = PrefixCollator(pad_token_id=0)
    transformers.Trainer(model, arguments, train_dataset=FEATURES, data_collator=collator).train()
    assert model(**batches("right")[0]).loss.item() < start - 0.3


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prefix"), [("danlu_prefix", 6), *((name, 5) for name in NAMES), (NAMES[1], 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_equals_full_passes(name, prefix, padded):
    model = decoder(attention=name)
    prompt = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(3))
    shown = torch.ones_like(prompt)
    if padded:
        shown[1, :2] = 0
    read = prefix_prompt(model, prompt, attention_mask=shown, prefix_length=None if prefix == 6 else prefix)
    found = model.generate(**read, max_new_tokens=6, do_sample=False)
    grown, mask = prompt, shown
    for _ in range(6):
        step = model(grown, attention_mask=mask, prefix_lengths=torch.tensor([prefix, prefix])).logits[:, -1]
        grown = torch.cat((grown, step.argmax(-1, keepdim=True)), 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(found, grown)


def test_bad_prompts():
    model = decoder()
    two = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"model must have attention 'danlu_prefix' or .*, got 'sdpa'"):
        prefix_prompt(decoder(attention="sdpa"), two)
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, L\) with L >= 2, got \(1, 1\)"):
        prefix_prompt(model, two[:, :1])
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 2\)"):
        prefix_prompt(model, two, attention_mask=two[:, :1])
    with pytest.raises(ValueError, match="at most 2 of 2 slots with 'danlu_prefix', got 3"):
        prefix_prompt(model, two, prefix_length=3)
    with pytest.raises(ValueError, match="at most 1 of 2 slots with 'danlu_alternate', got 2"):
        prefix_prompt(decoder(attention="danlu_alternate"), two)
    with pytest.raises(TypeError, match="prefix_length must be an int"):
        prefix_prompt(model, two, prefix_length=1.0)
    with pytest.raises(ValueError, match="padded on the left"):
        prefix_prompt(model, two, attention_mask=torch.tensor([[1, 0]]))


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_unknown_names_and_registration():
    with pytest.raises(ValueError, match="name must be one of 'danlu_prefix', 'danlu_forward_backward'"):
        register_split_attention("danlu_suffix")
    for name in NAMES:
        assert name in AttentionInterface()
        assert name in AttentionMaskInterface()


@pytest.mark.parametrize("name", NAMES)
def test_a_causal_model_does_not_guess_its_prefix(name):
    model = decoder(attention=name)
    with pytest.raises(ValueError, match=r"needs prefix_lengths=\.\.\. in the call of a causal model"):
        model(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="to generate, see prefix_prompt"):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2)


def test_what_split_attention_does_not_know_is_refused():
    tokens, prefix = torch.ones(1, 6, dtype=torch.long), {"prefix_lengths": torch.tensor([3])}
    model = decoder()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed sequences"):
        model(tokens, position_ids=positions, use_cache=False, **prefix)
    with pytest.raises(ValueError, match=r"must have shape \(B, N\), got \(1, 1, 6, 6\)"):
        model(tokens, attention_mask=torch.zeros(1, 1, 6, 6), **prefix)
    with pytest.raises(ValueError, match="static caches"):
        model(tokens, past_key_values=transformers.StaticCache(model.config, max_cache_len=16), **prefix)
    with pytest.raises(ValueError, match="no dropout of its weights"):
        decoder(attention_dropout=0.1).train()(tokens, **prefix)
    with pytest.raises(ValueError, match="windows and other masks"):
        decoder("mistral", sliding_window=4)(tokens, **prefix)
    with pytest.raises(ValueError, match=r"prefix_lengths must be in \[0, 6\]"):
        model(tokens, prefix_lengths=torch.tensor([7]))
    module = model.model.layers[0].self_attn
    attend = register_split_attention("danlu_prefix")
    query, key = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    for option, match in (
        ({"softcap": 30.0}, "does not know the option 'softcap'"),
        ({"s_aux": torch.zeros(4)}, "does not know the option 's_aux'"),
        ({"position_bias": torch.zeros(1, 4, 6, 6)}, "does not know the option 'position_bias'"),
        ({"sliding_window": 3}, "a sliding window of 3 does not reach over the 6 slots"),
    ):
        with pytest.raises(ValueError, match=match):
            attend(module, query, key, key, None, **prefix, **option)
    with pytest.raises(ValueError, match="is for self-attention"):
        attend(module, query, key[:, :, :3], key[:, :, :3], None, **prefix)
    with pytest.raises(ValueError, match="does not know its layer"):
        register_split_attention("danlu_alternate")(nn.Identity(), query, key, key, None, **prefix)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_probe_knows_what_rows_see(name, padded):
    """Beside the dense weights of the queries and keys that the attention was given."""
    model = decoder(attention=name)
    tokens = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    shown = torch.ones(2, 9).bool()
    shown[1, : 3 * padded] = False
    seen = []
    layer = model.model.layers[1].self_attn
    inner = register_split_attention(name)

    def attend(module, query, key, *args, **kwargs):
        seen.append((query, key))
        return inner(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, attend)
    with AttentionProbe(model) as probe:
        model(tokens, attention_mask=shown.long(), prefix_lengths=torch.tensor([5, 4]))
    query, key = seen[1]
    kind = {"danlu_prefix": "prefix", "danlu_forward_backward": "forward_backward"}.get(name, "backward")
    heads = 4 if kind == "forward_backward" else None
    pairs = attention_mask(kind, 9, prefix_lengths=torch.tensor([5, 4]), num_heads=heads).attn_mask
    pairs = pairs & shown[:, None, None, :] & shown[:, None, :, None]
    scores = query @ key.repeat_interleave(2, 1).transpose(-2, -1) * layer.scaling
    weights = scores.masked_fill(~pairs, -torch.inf).softmax(-1)
    expected = attention_sparsity(weights, mask=pairs, kind="n_eff").transpose(0, 1).flatten(1)
    found = probe.rows("model.layers.1.self_attn")["n_eff"]
    for head in range(4):
        wanted = expected[head][~expected[head].isnan()].float()
        torch.testing.assert_close(found[head][~found[head].isnan()], wanted, rtol=1e-5, atol=0)


def test_scale_of_the_model_is_used():
    module = decoder().model.layers[0].self_attn
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    attend = register_split_attention("danlu_prefix")
    out = attend(module, query, key, key, None, scaling=0.5, prefix_lengths=6)[0]
    grown = key.repeat_interleave(2, 1)
    dense = (query @ grown.transpose(-2, -1) * 0.5).softmax(-1) @ grown
    torch.testing.assert_close(out, dense.transpose(1, 2))
