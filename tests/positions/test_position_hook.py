"""Random positions by a hook: what reaches the model in training and in evaluation, and what is refused."""

import pytest
import torch
from torch import nn

from danlu.positions import even_positions, random_positions, randomize_positions

IDS = torch.arange(12).view(2, 6)
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


class Model(nn.Module):
    """Returns what it is given."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, cache=None):
        return input_ids, attention_mask, position_ids


def test_training_draws_and_evaluation_does_not():
    model = Model()
    with randomize_positions(model, max_position=50):
        ids, mask, first = model(IDS)
        assert torch.equal(ids, IDS)
        assert mask.tolist() == [[1] * 6] * 2
        assert first.dtype == torch.int64
        assert (first.diff() > 0).all()
        assert first.max() < 50
        assert len(torch.cat((first, model(input_ids=IDS)[2])).unique(dim=0)) == 4
        padded = model(IDS, MASK)[2]
        assert padded[1, :2].tolist() == [0, 0]
        assert padded[1, 2:].diff().min() > 0
        assert model(inputs_embeds=torch.zeros(2, 6, 4))[1].shape == (2, 6)
        model.eval()
        for _ in range(2):
            assert torch.equal(model(IDS, attention_mask=MASK)[2], even_positions(MASK, 50).long())
    # Without the hook the model is given what it is given.
    assert model(IDS)[1:] == (None, None)


def test_equal_means_leave_the_evaluation_alone():
    model = Model()
    handle = randomize_positions(model, mode="equal_mean", distribution="beta", max_position=60)
    found = model(IDS, MASK)[2]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], found[0, 1] * torch.arange(6))
    assert model.eval()(IDS, cache="any")[1:] == (None, None)
    handle.remove()
    handle.remove()
    assert model.train()(IDS)[2] is None


def test_draws_are_those_of_the_function_and_of_the_rank(monkeypatch):
    def draws(seed: int, rank: int) -> torch.Tensor:
        monkeypatch.setenv("RANK", str(rank))
        model = Model()
        with randomize_positions(model, max_position=1000, seed=seed):
            return torch.cat([model(IDS)[2] for _ in range(2)])

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(draws(3, 0), draws(3, 0))
    assert torch.equal(torch.rand(1), expected)
    rows = torch.cat([draws(3, 0), draws(3, 1), draws(4, 0)])
    assert len(rows.unique(dim=0)) == len(rows)
    model = Model()
    with randomize_positions(model, max_position=1000) as handle:
        source = torch.Generator().manual_seed(handle._source(torch.device("cpu")).initial_seed())
        assert torch.equal(model(IDS, MASK)[2], random_positions(MASK, 1000, generator=source))


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes)).double()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            # Random weights of this size hardly attend.
            parameter.data.mul_(10)
    return model


def test_a_model_of_transformers_sees_the_whole_text_at_the_positions():
    model, changed = llama(), IDS + (torch.arange(6) == 0)
    for options in ({"max_position": 64}, {"mode": "equal_mean"}):
        with randomize_positions(model.train(), **options):
            # The trap of steps other than 1 without a mask: nothing of the first token would arrive.
            torch.manual_seed(0)
            first, second = (model(ids, use_cache=False).logits for ids in (IDS, changed))
            assert (first - second)[:, -1].abs().max() > 0.01
    with randomize_positions(model.eval(), max_position=60), torch.no_grad():
        found = model(IDS).logits
    positions = torch.arange(0, 60, 10).expand(2, -1)
    expected = model(IDS, position_ids=positions, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, expected)


def test_checkpointing_does_not_draw_again():
    model, seen = llama().train(), []
    model.gradient_checkpointing_enable()
    model.model.rotary_emb.register_forward_hook(lambda module, inputs, out: seen.append(out[0]))
    with randomize_positions(model, max_position=64):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(seen) == 1


def test_refusals():
    model = Model()
    with randomize_positions(model, max_position=50):
        for mode in (model.train(), model.eval()):
            with pytest.raises(ValueError, match="position_ids already"):
                mode(IDS, position_ids=IDS)
            with pytest.raises(ValueError, match="cache is for text that grows"):
                mode(IDS, cache=object())
            with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, L\), got \(2, 1, 6, 6\)"):
                mode(IDS, torch.ones(2, 1, 6, 6))
            with pytest.raises(TypeError, match="must have input_ids or inputs_embeds"):
                mode()
    with pytest.raises(ValueError, match="max_position is missing"):
        randomize_positions(model)
    with pytest.raises(ValueError, match="Linear does not take position_ids"):
        randomize_positions(nn.Linear(2, 2), max_position=9)
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"mode='equal_mean' has real positions.*wpe"):
        randomize_positions(gpt2, mode="equal_mean")
