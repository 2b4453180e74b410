"""Frequencies that follow the length, and log-n, in tiny random models of transformers: what they equal, the cache."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from danlu.integrations.transformers import DynamicRopeExtension, extend_rope, patch_rope  # noqa: E402

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HALF = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 16}
DYNAMIC = {"dynamic": True, "method": "ntk-aware", "factor": 2.0}
LENGTH = 48


def build(kind="Llama", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**HALF, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            # Random weights attend evenly; larger ones make a difference.
            parameter.data.mul_(10)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids=None, **inputs) -> torch.Tensor:
    return model(tokens() if ids is None else ids, **inputs).logits


def rope(kind: str, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
def test_the_rule_is_that_of_transformers(factor):
    # With one layer, whose keys do not depend on older frequencies, the last token is that of transformers.
    model = build(num_hidden_layers=1)
    peer = build(num_hidden_layers=1, **rope("dynamic", factor=factor))
    plain = logits(model)
    with extend_rope(model, dynamic=True, method="ntk-aware", factor=factor, step=1):
        out = logits(model)
    for length in (9, 16, 17, 18, 31, LENGTH):
        expected = logits(copy.deepcopy(peer), tokens()[:, :length])[:, -1]
        # Angles of transformers are float32.
        torch.testing.assert_close(out[:, length - 1], expected, rtol=0, atol=1e-5)
    assert (out - plain)[:, 16:].abs().max() > 1e-2
    torch.testing.assert_close(out[:, :16], plain[:, :16], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"step": 1}, {"logn": "post"}], ids=["eighth", "1", "logn"])
def test_the_cache_is_exact_however_the_text_is_cut(options):
    model = build()
    with extend_rope(model, **DYNAMIC, **options):
        full = logits(model)
        for size in (1, 7, 20):
            cache, steps = None, []
            for low in range(0, LENGTH, size):
                with torch.no_grad():
                    out = model(tokens()[:, low : low + size], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
            torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-11)
        # What a token says does not depend on what comes after it.
        torch.testing.assert_close(logits(model, tokens()[:, :30]), full[:, :30], rtol=0, atol=1e-11)


def test_generation_is_the_same_with_any_cache_and_padding():
    model = build()
    ids = tokens(2, 13)
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.int64), ids), 1)
    mask = (torch.arange(17) >= 4).long().expand(2, -1)
    options = {"max_new_tokens": 12, "do_sample": False}
    with extend_rope(model, **DYNAMIC, step=3):
        answer = model.generate(ids, use_cache=False, **options)[:, 13:]
        assert torch.equal(model.generate(ids, **options)[:, 13:], answer)
        static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static[:, 13:], answer)
        assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 17:], answer)
        beams = [model.generate(ids, num_beams=3, use_cache=use, **options) for use in (True, False)]
        assert torch.equal(*beams)
        # Texts of different lengths in one batch.
        ragged, seen = padded.clone(), mask.clone()
        ragged[0, :9], seen[0, :9] = 0, 0
        both = model.generate(ragged, attention_mask=seen, **options)[:, 17:]
        assert torch.equal(both[1], answer[1])
        assert torch.equal(both[0], model.generate(ragged[:1, 9:], **options)[0, 8:])


def test_padding_changes_nothing():
    model = build()
    with extend_rope(model, **DYNAMIC):
        full = logits(model)
        for left, right in ((5, 0), (0, 5)):
            ids = torch.nn.functional.pad(tokens(), (left, right))
            mask = torch.nn.functional.pad(torch.ones(2, LENGTH, dtype=torch.int64), (left, right))
            found = logits(model, ids, attention_mask=mask)[:, left : left + LENGTH]
            torch.testing.assert_close(found, full, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", rope("yarn", factor=2.0, original_max_position_embeddings=8)),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Mistral", {"sliding_window": None}),
        ("Phi3", {"pad_token_id": 0, **rope("default", partial_rotary_factor=0.5)}),
        ("SmolLM3", {"pad_token_id": 0, "no_rope_layers": [1, 0]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("options", [DYNAMIC, {"factor": 2.0, "logn": "post"}], ids=["dynamic", "logn"])
def test_in_place_and_back_bit_for_bit(kind, changes, options):
    model = build(kind, torch.float32, **changes)
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    names, implementation = dict(model.named_buffers()).keys(), model.config._attn_implementation
    handle = extend_rope(model, **options)
    extended = logits(model)
    assert (extended - before).abs().max() > 1e-4
    if options is DYNAMIC:
        assert isinstance(handle, DynamicRopeExtension)
        torch.testing.assert_close(extended[:, :16], before[:, :16], rtol=0, atol=2e-3)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    handle.remove()
    handle.remove()
    assert dict(model.named_buffers()).keys() == names
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model), before)
    with extend_rope(model, **options):
        assert torch.equal(logits(model), extended)
    assert torch.equal(logits(model), before)


def test_log_n_is_that_of_rerope_with_a_window_beyond_the_text():
    model = build()
    with patch_rope(model, window=1000, logn="post"):
        expected = logits(model)
    padding = torch.nn.functional.pad(torch.ones(2, LENGTH, dtype=torch.int64), (5, 0))
    with extend_rope(model, factor=1.0, logn="post"):
        found = logits(model)
        padded = logits(model, torch.nn.functional.pad(tokens(), (5, 0)), attention_mask=padding)
        answers = [model.generate(tokens(2, 12), max_new_tokens=9, do_sample=False, use_cache=c) for c in (True, False)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(padded[:, 5:], found, rtol=0, atol=1e-4)
    assert torch.equal(*answers)
    assert (found - logits(model)).abs().max() > 1e-2
    # Of another training length, and with a stretch.
    with extend_rope(model, factor=1.0, logn="post", train_length=LENGTH):
        torch.testing.assert_close(logits(model), logits(build()), rtol=0, atol=1e-5)
    with extend_rope(model, factor=3.0), patch_rope(model, window=1000, logn="post"):
        expected = logits(model)
    with extend_rope(model, factor=3.0, logn="post"):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_training_length_of_the_configuration_or_given():
    model = build()
    assert extend_rope(model, dynamic=True).remove() is None
    with extend_rope(model, dynamic=True, train_length=20) as handle:
        assert handle.rule.train_length == 20
        assert handle.rule.factor == 1.0
        given = logits(model)
    with extend_rope(build(max_position_embeddings=20), dynamic=True) as handle:
        assert torch.equal(logits(handle.model), given)


def test_learns_through_it():
    model = build(dtype=torch.float32).train()
    with extend_rope(model, **DYNAMIC):
        model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def packed(model):
    positions = torch.cat((torch.arange(20), torch.arange(28)))[None]
    return model(tokens(1), position_ids=positions, use_cache=False)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: build(**rope("dynamic", factor=2.0)),
            r"extend it with dynamic=True, the same factor and method='ntk-aware'",
        ),
        (lambda: build("Mistral", sliding_window=8), "layers with a sliding window"),
        (lambda: build("Cohere", pad_token_id=0), "does not rotate channels in halves"),
    ],
    ids=["dynamic", "sliding", "neighbors"],
)
def test_what_cannot_work_is_refused_and_left_alone(make, match):
    model = make()
    before = logits(model)
    try:
        with pytest.raises(ValueError, match=match):
            extend_rope(model, **DYNAMIC)
    finally:
        assert torch.equal(logits(model), before)


def test_no_two_at_once_and_no_packed_texts():
    model = build()
    with extend_rope(model, **DYNAMIC):
        for again in (lambda: extend_rope(model, **DYNAMIC), lambda: extend_rope(model, factor=2.0)):
            with pytest.raises(ValueError, match="extended by attention of its own"):
                again()
        with pytest.raises(ValueError, match="cannot be patched: it is patched already"):
            patch_rope(model)
        with pytest.raises(ValueError, match="packed texts and masks of one's own have no length"):
            packed(model)
    with extend_rope(model, factor=2.0), pytest.raises(ValueError, match="it is extended already"):
        extend_rope(model, **DYNAMIC)
    # One factor has no length to look for.
    with extend_rope(model, factor=1.0, logn="post", train_length=LENGTH):
        found = packed(model).logits
    torch.testing.assert_close(found, packed(model).logits, rtol=0, atol=1e-5)
