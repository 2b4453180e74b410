"""The fused head on tiny random models of transformers, alone and in the Trainer."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from danlu.integrations.transformers import token_loss  # noqa: E402
from danlu.integrations.transformers_linear import LinearLossMixin, fused_causal_lm_loss  # noqa: E402
from danlu.losses import EMO, GeneralizedCE, TaiLr, emo_loss, generalized_cross_entropy, tailr_loss  # noqa: E402

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "llama_tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.25)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=4.0)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    ),
}


def make(family: str):
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def batch():
    ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100
    return ids, mask, labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["cross_entropy", "tailr", "emo"])
def test_equals_the_dense_loss(family, kind):
    model, (ids, mask, labels) = make(family), batch()
    loss, plain = {
        "cross_entropy": (None, None),
        "tailr": (TaiLr(0.3), partial(tailr_loss, gamma=0.3)),
        "emo": (EMO(cost_embedding="head"), partial(emo_loss, cost_embedding=model.get_output_embeddings().weight)),
    }[kind]
    value = fused_causal_lm_loss(model, ids, mask, labels, loss=loss, chunk_size=5)
    value.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if plain is None:
        expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    else:
        logits = model(input_ids=ids, attention_mask=mask).logits
        expected = plain(logits[:, :-1], labels[:, 1:])
    expected.backward()
    # The model's own loss is computed in float32.
    torch.testing.assert_close(value, expected.double(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_count_statistics_and_unshifted_labels():
    model, (ids, mask, labels) = make("llama"), batch()
    mean = fused_causal_lm_loss(model, ids, mask, labels)
    count = int((labels[:, 1:] != -100).sum())
    summed = fused_causal_lm_loss(model, ids, mask, labels, num_items_in_batch=torch.tensor(2 * count))
    torch.testing.assert_close(summed, mean / 2)
    value, stats = fused_causal_lm_loss(model, ids, mask, labels, return_stats=True)
    assert stats.nll.shape == labels.shape
    torch.testing.assert_close(stats.nll.sum() / count, value)
    logits = model(input_ids=ids, attention_mask=mask).logits
    unshifted = fused_causal_lm_loss(model, ids, mask, labels, shift=False)
    torch.testing.assert_close(unshifted, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    embedded = fused_causal_lm_loss(model, None, mask, labels, inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(embedded, mean)


def test_dense_losses_as_compute_loss_func():
    """EMO and the relatives of TaiLr where the logits are at hand."""
    model, (ids, mask, labels) = make("llama"), batch()
    outputs = model(input_ids=ids, attention_mask=mask)
    for dense, row in (
        (
            partial(emo_loss, cost_embedding=model.lm_head.weight, max_ratio=3.0),
            EMO(cost_embedding="head", max_ratio=3.0),
        ),
        (partial(generalized_cross_entropy, q=0.4), GeneralizedCE(0.4)),
    ):
        value = token_loss(dense)(outputs, labels, torch.tensor(20))
        expected = fused_causal_lm_loss(model, ids, mask, labels, loss=row, num_items_in_batch=20)
        torch.testing.assert_close(value, expected)


def test_refusals():
    model, (ids, mask, labels) = make("llama"), batch()
    with pytest.raises(ValueError, match="labels are needed"):
        fused_causal_lm_loss(model, ids, mask)
    with pytest.raises(ValueError, match="model must be a transformers model, got Linear"):
        fused_causal_lm_loss(nn.Linear(2, 2), ids, mask, labels)
    odd = make("llama")
    forward = odd.forward

    def doubled(*args, logits_to_keep=0, **kwargs):
        found = forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        found.logits = 2 * found.logits
        return found

    odd.forward = doubled
    with pytest.raises(ValueError, match="are not a linear function of its last hidden states"):
        fused_causal_lm_loss(odd, ids, mask, labels)
    odd = make("llama")
    odd.lm_head = nn.Sequential(odd.lm_head)
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is a Sequential"):
        fused_causal_lm_loss(odd, ids, mask, labels)
    odd = make("llama")
    odd.forward = lambda input_ids, attention_mask: None
    with pytest.raises(ValueError, match="cannot be asked for the logits of the last position alone"):
        fused_causal_lm_loss(odd, ids, mask, labels)
    assert not model.base_model._forward_hooks


class Fused(LinearLossMixin, transformers.Trainer):
    pass


def trainer(cls, folder, *, accumulation=1, size=4, **options):
    torch.manual_seed(0)
    ids = torch.randint(1, 40, (8, 10), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row.masked_fill(torch.arange(10) < i, -100)} for i, row in enumerate(ids)]
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        seed=0,
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    model = FAMILIES["llama"]()
    return cls(model=model, args=arguments, train_dataset=data, eval_dataset=data, optimizers=sgd(model), **options)


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def test_trainer_equals_the_models_own_loss_with_accumulation(tmp_path):
    weights = {}
    for name, cls, accumulation, size in (
        ("own", transformers.Trainer, 1, 8),
        ("fused", Fused, 1, 8),
        ("accumulated", Fused, 4, 2),
    ):
        one = trainer(cls, tmp_path / name, accumulation=accumulation, size=size)
        one.train()
        weights[name] = one.model.state_dict()
        weights[name]["eval"] = torch.tensor(one.evaluate()["eval_loss"])
    for name in ("fused", "accumulated"):
        for key, value in weights["own"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=1e-4, atol=1e-6)


def test_trainer_takes_a_row_loss_and_refuses_metrics(tmp_path):
    one = trainer(Fused, tmp_path, row_loss=TaiLr(1.0))
    one.train()
    assert 0 < one.evaluate()["eval_loss"] < 1
    with pytest.raises(ValueError, match="compute_metrics needs the logits of all positions"):
        trainer(Fused, tmp_path, compute_metrics=lambda found: {})
