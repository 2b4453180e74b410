"""Losses in the Trainer of transformers."""

from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers")

from danlu.integrations.transformers import token_loss  # noqa: E402
from danlu.losses import tailr_loss  # noqa: E402


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 40, (1, length), generator=torch.Generator().manual_seed(seed))


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config)
    # Random weights attend evenly; larger ones make positions matter.
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(20)
    return model


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
        model = llama()
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

    start = [p.detach() for p in llama().parameters()]
    one, four = trained(8, 1), trained(2, 4)
    assert max((a - b).abs().max() for a, b in zip(one, start, strict=True)) > 1e-3
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
