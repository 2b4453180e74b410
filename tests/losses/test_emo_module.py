"""The module of EMO: its copy of the head, and when that is renewed."""

import copy
import gc

import pytest
import torch
from torch import nn

from danlu.losses import EMOLoss, emo_loss


class Model(nn.Module):
    """The accessor is that of transformers."""

    def __init__(self, head: nn.Module | None = None):
        super().__init__()
        self.head = nn.Linear(4, 9, bias=False) if head is None else head

    def get_output_embeddings(self):
        return self.head


def batch():
    return torch.randn(5, 9), torch.randint(9, (5,))


@pytest.mark.parametrize("head_alone", [False, True])
def test_from_model_copies_the_head_once(head_alone):
    model = Model()
    loss = EMOLoss.from_model(model.head if head_alone else model, mode="pure", ignore_index=3)
    logits, target = batch()
    before = loss(logits, target)
    expected = emo_loss(logits, target, cost_embedding=model.head.weight, mode="pure", ignore_index=3)
    torch.testing.assert_close(before, expected)
    torch.testing.assert_close(loss.cost_embedding.norm(dim=1), torch.ones(9))
    with torch.no_grad():
        model.head.weight.normal_()
    assert torch.equal(loss(logits, target), before)
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    with pytest.raises(RuntimeError, match="there is no head to copy: give refresh_every"):
        loss.refresh()


def test_the_copy_is_renewed_every_so_many_calls_of_training():
    model = Model()
    loss = EMOLoss.from_model(model, refresh_every=2)
    seen = []
    for call in range(5):
        with torch.no_grad():
            model.head.weight[0] = torch.tensor([call + 1.0, 1.0, 0.0, 0.0])
        loss(*batch())
        seen.append(round(float(loss.cost_embedding[0, 0] / loss.cost_embedding[0, 1])))
    # The copy of construction serves calls 0 and 1; a new one is made before calls 2 and 4.
    assert seen[2:] == [3, 3, 5]
    assert seen[0] == seen[1] != 1
    loss.eval()
    loss(*batch())
    loss(*batch())
    assert round(float(loss.cost_embedding[0, 0] / loss.cost_embedding[0, 1])) == 5


def test_a_model_is_not_part_of_its_loss():
    model = Model()
    loss = EMOLoss.from_model(model, refresh_every=1)
    assert list(loss.modules()) == [loss]
    assert copy.deepcopy(loss).refresh_every == 1
    del model
    gc.collect()
    loss(*batch())
    with pytest.raises(RuntimeError, match="keep the model alive"):
        loss(*batch())


def test_dtype_and_moves():
    loss = EMOLoss(torch.randn(9, 4).bfloat16())
    assert loss.cost_embedding.dtype == torch.bfloat16
    assert loss.double().cost_embedding.dtype == torch.float64
    assert EMOLoss(cost_matrix=torch.ones(9, 9)).to("meta").cost_matrix.is_meta


def test_bad_input():
    with pytest.raises(ValueError, match="ReLU has no output embedding"):
        EMOLoss.from_model(nn.ReLU())
    with pytest.raises(ValueError, match="refresh_every must be at least 1"):
        EMOLoss.from_model(Model(), refresh_every=0)
    with pytest.raises(ValueError, match="exactly one of cost_embedding and cost_matrix"):
        EMOLoss()
    with pytest.raises(ValueError, match="mode must be one of"):
        EMOLoss(torch.eye(3), mode="paper")
    with pytest.raises(ValueError, match="reduction must be one of"):
        EMOLoss(torch.eye(3), reduction="avg")
