"""Gradient penalties in the Trainer, on a tiny random Llama."""

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from danlu.integrations.transformers_penalty import GradientPenaltyMixin  # noqa: E402
from danlu.losses import GradientPenalty, input_gradient_penalty, parameter_gradient_penalty  # noqa: E402


class Penalized(GradientPenaltyMixin, transformers.Trainer):
    pass


def llama(attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config)


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def linear_layers(model: nn.Module) -> nn.ModuleList:
    return nn.ModuleList([module for module in model.modules() if isinstance(module, nn.Linear)])


def arguments(folder, *, size: int = 8, accumulation: int = 1, steps: int = 1, **more):
    options = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
    }
    return transformers.TrainingArguments(**{**options, **more})


def stepped(folder, penalty, model, **options) -> list[Tensor]:
    trainer = Penalized(model, arguments(folder, **options), train_dataset=rows(), gradient_penalty=penalty)
    trainer.train()
    return [parameter.detach() for parameter in model.parameters()]


def by_hand(penalty_of, model: nn.Module) -> list[Tensor]:
    """One step of descent on the mean loss of all rows plus the penalty."""
    batch = torch.stack([row["input_ids"] for row in rows()])
    embeds = model.get_input_embeddings()(batch)

    def loss() -> Tensor:
        return model(inputs_embeds=embeds, labels=batch).loss

    (loss() + penalty_of(loss, embeds)).backward()
    return [p.detach() - 0.1 * p.grad for p in model.parameters()]


ARMS = {
    "input": (
        "eager",
        lambda model: GradientPenalty(model, input=300.0),
        lambda model: lambda loss, embeds: 300 * input_gradient_penalty(loss(), embeds),
    ),
    "double_backward": (
        "eager",
        lambda model: GradientPenalty(model, parameter=0.5),
        lambda model: lambda loss, embeds: 0.5 * parameter_gradient_penalty(loss, model)[1],
    ),
    # Fused attention, which has no second derivative, against double backward of the plain one.
    "finite_difference": (
        "sdpa",
        lambda model: GradientPenalty(model, parameter=0.5, method="finite_difference", central=True),
        lambda model: lambda loss, embeds: 0.5 * parameter_gradient_penalty(loss, model)[1],
    ),
    "per_sample": (
        "eager",
        lambda model: GradientPenalty(linear_layers(model), parameter=0.05, scope="per_sample"),
        lambda model: (
            lambda loss, embeds: 0.05 * parameter_gradient_penalty(loss, linear_layers(model), scope="per_sample")[1]
        ),
    ),
}


@pytest.mark.parametrize("arm", ARMS)
def test_one_step_of_the_trainer_equals_one_by_hand(arm, tmp_path):
    attention, made, penalty_of = ARMS[arm]
    model, start = llama(attention), llama()
    found = stepped(tmp_path, made(model), model)
    reference, plain = llama(), llama()
    expected = by_hand(penalty_of(reference), reference)
    without = by_hand(lambda loss, embeds: 0.0, plain)
    effect = max((a - b).abs().max() for a, b in zip(expected, without, strict=True))
    assert effect > 1e-3
    for one, other, old in zip(found, expected, start.parameters(), strict=True):
        assert not torch.equal(one, old)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=float(1e-2 * effect))


def test_fused_attention_without_second_derivative_names_the_remedy(tmp_path):
    model = llama("sdpa")
    with pytest.raises(RuntimeError, match=r"SDPBackend\.MATH\), or use method='finite_difference'"):
        stepped(tmp_path, GradientPenalty(model, parameter=0.5), model)


def test_layers_that_per_sample_norms_do_not_know_are_named(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match=r"input_layernorm' \(LlamaRMSNorm\).*nn\.ModuleList"):
        stepped(tmp_path, GradientPenalty(model, parameter=0.5, scope="per_sample"), model)


@pytest.mark.parametrize("arm", ["input", "finite_difference"])
def test_accumulation_averages_the_penalties_of_the_micro_batches(arm, tmp_path):
    """Micro-batches are equal here, so four of them give the step of one of them."""
    _, made, _ = ARMS[arm]

    def trained(size: int, accumulation: int, data: list[dict[str, Tensor]]) -> list[Tensor]:
        model = llama()
        trainer = Penalized(
            model,
            arguments(tmp_path, size=size, accumulation=accumulation),
            train_dataset=data,
            gradient_penalty=made(model),
        )
        trainer.train()
        return [parameter.detach() for parameter in model.parameters()]

    same = [rows(1)[0]] * 8
    one, four = trained(2, 1, same[:2]), trained(2, 4, same)
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_schedule_follows_optimizer_steps_and_evaluation_has_no_penalty(tmp_path):
    model = llama()
    penalty = GradientPenalty(model, parameter=0.5, method="finite_difference", every=3)
    seen = []
    weights = penalty.weights
    penalty.weights = lambda step: seen.append(step) or weights(step)
    trainer = Penalized(
        model,
        arguments(tmp_path, size=2, accumulation=2, steps=4),
        train_dataset=rows(),
        eval_dataset=rows(),
        gradient_penalty=penalty,
    )
    trainer.train()
    assert sorted(set(seen)) == [0, 1, 2, 3]
    seen.clear()
    loss = trainer.evaluate()["eval_loss"]
    assert seen == []
    batch = torch.stack([row["input_ids"] for row in rows()])
    assert loss == pytest.approx(float(model(batch, labels=batch).loss.detach()), rel=1e-5)
    model.train()
    found, outputs = trainer.compute_loss(model, {"input_ids": batch, "labels": batch}, return_outputs=True)
    assert found.ndim == 0
    assert outputs["logits"].shape == (8, 10, 40)


def test_bad_arguments(tmp_path):
    model = llama()
    penalty = GradientPenalty(model, input=1.0)
    with pytest.raises(TypeError, match="gradient_penalty must be a GradientPenalty, got float"):
        Penalized(model, arguments(tmp_path), gradient_penalty=0.5)
    with pytest.raises(TypeError, match="inputs must be the name of a model input"):
        Penalized(model, arguments(tmp_path), gradient_penalty=penalty, inputs=3)
    trainer = Penalized(model, arguments(tmp_path), gradient_penalty=penalty, inputs="pixel_values")
    batch = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs the model input 'pixel_values', got input_ids, labels"):
        trainer.compute_loss(model.train(), {"input_ids": batch, "labels": batch})
    both = GradientPenalty(model, input=1.0, parameter=1.0, method="finite_difference")
    trainer = Penalized(model, arguments(tmp_path), gradient_penalty=both)
    with pytest.raises(ValueError, match="inputs must be a leaf"):
        trainer.compute_loss(model.train(), {"input_ids": batch, "labels": batch})
