"""ReRoPE in the pretrained SmolLM2-135M, where its carrier is: generation, caches, padding, beams, removal."""

from functools import partial
from pydoc_data.topics import topics

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from danlu.integrations.transformers import patch_rope
from danlu.lab.data import DataError
from danlu.lab.models import load_smollm2

pytestmark = pytest.mark.slow

WINDOW, LENGTH = 40, 96


@pytest.fixture(scope="module")
def smollm2():
    try:
        model, tokenizer = load_smollm2()
    except DataError as error:
        pytest.skip(str(error))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return model.eval(), torch.tensor([tokenizer(text[: 16 * LENGTH])["input_ids"][: 2 * LENGTH]])


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def in_chunks(model, ids, size):
    cache, found = None, []
    with torch.no_grad():
        for chunk in ids.split(size, 1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, 1)


def test_a_wide_window_is_the_model_itself(smollm2):
    model, ids = smollm2
    plain = logits(model, ids[:, :LENGTH])
    with patch_rope(model) as handle:
        assert (handle.window, handle.train_length) == (4096, 8192)
        assert (logits(model, ids[:, :LENGTH]) - plain).abs().max() < 1e-3 * plain.abs().max()


def test_removal_restores_bitwise(smollm2):
    model, ids = smollm2
    plain, state = logits(model, ids[:, :LENGTH]), {k: v.clone() for k, v in model.state_dict().items()}
    with patch_rope(model, window=WINDOW):
        assert (logits(model, ids[:, :LENGTH]) - plain)[:, WINDOW + 8 :].abs().max() > 0.1
        assert model.state_dict().keys() == state.keys()
    assert torch.equal(logits(model, ids[:, :LENGTH]), plain)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_a_cache_in_chunks_of_any_size_is_the_full_pass(smollm2):
    model, ids = smollm2
    with patch_rope(model, window=WINDOW):
        full = logits(model, ids[:, :LENGTH])
        for size in (1, 17, 50):
            torch.testing.assert_close(in_chunks(model, ids[:, :LENGTH], size), full, rtol=0, atol=2e-3)


def test_left_padding_is_no_padding(smollm2):
    model, ids = smollm2
    short, long = ids[:, :60], ids[:, :LENGTH]
    batch = torch.cat((F.pad(short, (LENGTH - 60, 0)), long))
    mask = F.pad(torch.ones_like(short), (LENGTH - 60, 0))
    with patch_rope(model, window=WINDOW):
        together = logits(model, batch, attention_mask=torch.cat((mask, torch.ones_like(long))))
        torch.testing.assert_close(together[:1, LENGTH - 60 :], logits(model, short), rtol=0, atol=2e-3)
        torch.testing.assert_close(together[1:], logits(model, long), rtol=0, atol=2e-3)


def test_generation_is_the_same_with_every_cache_and_padding(smollm2):
    model, ids = smollm2
    ids = ids[:, :60]
    generate = partial(model.generate, max_new_tokens=6, do_sample=False)
    padded = torch.cat((F.pad(ids, (9, 0)), F.pad(ids, (9, 0), value=5)))
    mask = torch.ones_like(padded)
    mask[0, :9] = 0
    with patch_rope(model, window=WINDOW):
        expected = generate(ids, use_cache=False)
        assert torch.equal(generate(ids), expected)
        assert torch.equal(generate(ids, cache_implementation="static", disable_compile=True), expected)
        assert torch.equal(generate(ids, prefill_chunk_size=25), expected)
        assert torch.equal(generate(padded, attention_mask=mask)[:1, 9:], expected)
        beams = generate(ids, num_beams=3)
        assert torch.equal(generate(ids, num_beams=3, use_cache=False), beams)
        assert torch.equal(generate(padded, attention_mask=mask, num_beams=3)[:1, 9:], beams)
