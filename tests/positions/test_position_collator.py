"""Random positions in a data collator: the mask that must be there, the draws of ranks and workers, and models."""

import pytest
import torch
from torch.utils.data import DataLoader

from danlu.positions import RandomPositionCollator, even_positions, random_positions


def stack(features):
    return {"input_ids": torch.tensor([feature["input_ids"] for feature in features])}


def padded(features):
    longest = max(len(feature["input_ids"]) for feature in features)
    rows = [feature["input_ids"] for feature in features]
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.zeros(len(rows)),
    }


ROWS = [{"input_ids": [4, 5, 6, 7]}, {"input_ids": [8, 9]}]
EQUAL = [{"input_ids": list(range(6))}] * 4


def test_adds_positions_and_a_mask():
    batch = RandomPositionCollator(stack, max_position=50)(EQUAL)
    assert batch["attention_mask"].tolist() == [[1] * 6] * 4
    assert batch["attention_mask"].dtype == torch.int64
    assert (batch["position_ids"].diff() > 0).all()
    assert batch["position_ids"].max() < 50
    assert len(batch["position_ids"].unique(dim=0)) == 4
    batch = RandomPositionCollator(padded, mode="equal_mean")(ROWS)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "position_ids"}
    assert batch["position_ids"][1, 2:].tolist() == [0, 0]
    assert batch["position_ids"].dtype == torch.float32
    features = {"inputs_embeds": torch.zeros(2, 3, 8)}
    assert RandomPositionCollator(lambda _: features, max_position=9)(None)["attention_mask"].shape == (2, 3)


def test_evaluation_is_deterministic():
    training = RandomPositionCollator(padded, max_position=40)
    evaluation = training.for_evaluation()
    mask = padded(ROWS)["attention_mask"]
    for _ in range(2):
        assert torch.equal(evaluation(ROWS)["position_ids"], even_positions(mask, 40).long())
    assert not torch.equal(training(ROWS)["position_ids"], training(ROWS)["position_ids"])
    plain = RandomPositionCollator(padded, mode="equal_mean").for_evaluation()(ROWS)["position_ids"]
    assert plain.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]


def test_seed_reproduces_and_ranks_differ(monkeypatch):
    def draws(seed: int, rank: int) -> torch.Tensor:
        monkeypatch.setenv("RANK", str(rank))
        collator = RandomPositionCollator(stack, max_position=1000, seed=seed)
        return torch.cat([collator(EQUAL)["position_ids"] for _ in range(2)])

    assert torch.equal(draws(3, 0), draws(3, 0))
    rows = torch.cat([draws(3, 0), draws(3, 1), draws(3, 7), draws(4, 0)])
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    RandomPositionCollator(stack, max_position=1000)(EQUAL)
    assert torch.equal(torch.rand(1), expected)


def test_workers_and_epochs_draw_differently():
    # Two epochs of two workers of one loader, whose generator has the same seed on every rank under Trainer.
    collator = RandomPositionCollator(stack, max_position=10_000)
    loader = DataLoader(
        EQUAL * 2, batch_size=2, num_workers=2, collate_fn=collator, generator=torch.Generator().manual_seed(0)
    )
    rows = torch.cat([batch["position_ids"] for _ in range(2) for batch in loader])
    assert len(rows) == 16
    assert len(rows.unique(dim=0)) == 16


def test_the_draw_is_that_of_the_function():
    collator = RandomPositionCollator(
        padded, mode="equal_mean", distribution="beta", max_position=60, concentration=3.0
    )
    collator.source()
    state = collator._source.get_state()
    expected = random_positions(
        padded(ROWS)["attention_mask"],
        mode="equal_mean",
        distribution="beta",
        max_position=60,
        concentration=3.0,
        generator=torch.Generator().set_state(state),
    )
    assert torch.equal(collator(ROWS)["position_ids"], expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "max_position is missing"),
        ({"max_position": 9, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"mode": "equal_mean", "distribution": "beta"}, ValueError, "max_position is missing"),
        ({"mode": "equal"}, ValueError, "mode must be one of"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        RandomPositionCollator(stack, **options)


def test_bad_batches():
    def collated(**batch):
        return RandomPositionCollator(lambda _: batch, max_position=9)(None)

    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="the batch has position_ids already"):
        collated(input_ids=tokens, position_ids=tokens)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, L\), got \(2, 1, 3, 3\)"):
        collated(input_ids=tokens, attention_mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="a batch must have input_ids or inputs_embeds"):
        collated(pixels=tokens)
    with pytest.raises(TypeError, match="return_tensors='pt'"):
        collated(input_ids=[[1, 2]], attention_mask=[[1, 1]])
    with pytest.raises(TypeError, match="collator must be callable"):
        RandomPositionCollator(None, max_position=9)
    with pytest.raises(ValueError, match="lengths must be at most max_position=5"):
        RandomPositionCollator(stack, max_position=5)(EQUAL)


# Models of transformers from here on.
SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, max_position_embeddings=64)).double()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            # Random weights of this size hardly attend.
            parameter.data.mul_(10)
    return model


def influence_of_the_first_token(model, batch) -> float:
    """Largest change of the last logits when token 0 changes."""
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 0] += 1
    # As in training: no cache.
    logits = [model(**{k: v for k, v in b.items() if k != "labels"}, use_cache=False).logits for b in (batch, other)]
    return float((logits[0][:, -1] - logits[1][:, -1]).detach().abs().max())


@pytest.mark.parametrize("options", [{"max_position": 64}, {"mode": "equal_mean"}], ids=["sorted", "equal_mean"])
def test_the_first_token_reaches_the_last_logits(options):
    model = llama()
    batch = RandomPositionCollator(stack, **options)(EQUAL)
    assert influence_of_the_first_token(model, batch) > 0.01
    # The trap: without the mask transformers takes the gaps for borders of packed texts.
    del batch["attention_mask"]
    assert influence_of_the_first_token(model, batch) == 0.0


def test_positions_reach_all_layers_and_checkpointing_does_not_draw_again():
    model = llama().train()
    batch = RandomPositionCollator(stack, max_position=64)(EQUAL)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for first, second in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
    # One draw for the model: every rotary table comes from these positions.
    seen = []
    model.model.rotary_emb.register_forward_hook(lambda module, inputs, kwargs, out: seen.append(out), with_kwargs=True)
    model(**batch, use_cache=False)
    assert len(seen) == 1


def test_collators_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    vocabulary = {"[PAD]": 0, "[MASK]": 1, **{f"w{i}": i for i in range(2, 40)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]")),
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    # Padding on the left, as generation has it.
    tokenizer.padding_side = "left"
    for inner in (
        transformers.DataCollatorWithPadding(tokenizer),
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=True),
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ):
        batch = RandomPositionCollator(inner, max_position=64, model=llama())(ROWS)
        assert batch["position_ids"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["position_ids"][1, :2].tolist() == [0, 0]
        assert batch["position_ids"][1, 3] > 0
    default = RandomPositionCollator(transformers.default_data_collator, max_position=64)
    assert default(EQUAL)["attention_mask"].shape == (4, 6)
    with pytest.raises(ValueError, match="position_ids already"):
        RandomPositionCollator(transformers.DataCollatorWithFlattening(return_tensors="pt"), max_position=64)(ROWS)


def test_models_that_cannot_take_the_positions():
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=64))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    )
    for model, table in ((bert, "position_embeddings"), (gpt2, "wpe")):
        with pytest.raises(ValueError, match=f"mode='equal_mean' has real positions.*{table}"):
            RandomPositionCollator(stack, mode="equal_mean", model=model)
        with pytest.raises(ValueError, match=f"max_position=65 is beyond the 64 rows of '.*{table}'"):
            RandomPositionCollator(stack, max_position=65, model=model)
        RandomPositionCollator(stack, max_position=64, model=model)
    with pytest.raises(ValueError, match="Linear does not take position_ids"):
        RandomPositionCollator(stack, max_position=64, model=torch.nn.Linear(2, 2))
    RandomPositionCollator(stack, mode="equal_mean", model=llama())


def test_a_model_with_adapters_is_looked_at_within():
    class Adapters(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def get_base_model(self):
            return self.base

        def forward(self, *args, **kwargs):
            return self.base(*args, **kwargs)

    RandomPositionCollator(stack, max_position=64, model=Adapters(llama()))
    with pytest.raises(ValueError, match="Linear does not take position_ids"):
        RandomPositionCollator(stack, max_position=64, model=Adapters(torch.nn.Linear(2, 2)))
