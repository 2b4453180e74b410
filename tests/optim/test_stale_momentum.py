"""The dead zone and the warning for embeddings that are not updated lazily."""

import math
import warnings

import pytest
import torch
from torch import nn

from danlu.optim import Lion, Tiger
from danlu.optim._stale_momentum import apply_deadzone

both = pytest.mark.parametrize("cls", [Lion, Tiger])


@both
def test_the_push_is_permanent_and_ends_with_the_dead_zone(cls):
    """After 6000 steps without a gradient the row still moves; with a dead zone only its decay does."""

    def optimizer_of(p, deadzone):
        options = {"lr": 1e-3, "weight_decay": 0.0, "sign_deadzone": deadzone}
        return cls([{"params": [p], "kind": "embedding"}], **options)

    found = {}
    for deadzone in (0.0, 1e-6):
        p = nn.Parameter(torch.full((2, 2), 0.5))
        optimizer = optimizer_of(p, deadzone)
        moves = []
        for step in range(3000):
            p.grad = torch.zeros(2, 2)
            p.grad[1] = 1e-4 * (-1.0) ** step
            p.grad[0] = -1e-4 * (step == 0)
            before = p.detach()[0].clone()
            optimizer.step()
            moves.append(bool((p.detach()[0] != before).any()))
        found[deadzone] = moves
    assert all(found[0.0])
    # The momentum must fall to 1e-6 of the RMS of the table: ln(1e6) / (1 - beta) steps, about.
    beta = 0.99 if cls is Lion else 0.965
    stop = found[1e-6].index(False)
    assert 0.5 * math.log(1e6) / (1 - beta) < stop < 1.3 * math.log(1e6) / (1 - beta)
    assert not any(found[1e-6][stop:])


def test_dead_zone_by_hand():
    m = torch.tensor([3.0, 4.0, 1e-3, 0.0, -2e-3])
    apply_deadzone(m, 1e-3 / 2)  # RMS 2.236, zone 0.00112
    assert torch.equal(m, torch.tensor([3.0, 4.0, 0.0, 0.0, -2e-3]))
    tiny = torch.tensor([3e-30, 1e-37])  # squares that float32 cannot hold
    apply_deadzone(tiny, 1e-6)
    assert torch.equal(tiny, torch.tensor([3e-30, 0.0]))
    for bad in (math.nan, math.inf):
        m = torch.tensor([bad, 1e-20])
        apply_deadzone(m, 0.5)
        assert m[1] == 1e-20
    for empty in (torch.zeros(0), torch.zeros(())):
        apply_deadzone(empty, 0.5)
    half = torch.tensor([1.0, 1e-3], dtype=torch.bfloat16)
    apply_deadzone(half, 0.1)
    assert torch.equal(half, torch.tensor([1.0, 0.0], dtype=torch.bfloat16))


@both
def test_dead_zone_counts_once_per_cycle_and_not_in_lazy_groups(cls):
    for group, expected in (({}, 0.0), ({"lazy": True}, 1e-9)):
        p = nn.Parameter(torch.zeros(2))
        optimizer = cls([{"params": [p], "kind": "vector", **group}], sign_deadzone=1e-3)
        p.grad = torch.zeros(2)
        optimizer.step()
        optimizer.state[p]["exp_avg"].copy_(torch.tensor([1.0, 1e-9]))
        p.grad = torch.zeros(2)
        optimizer.step()
        assert optimizer.state[p]["exp_avg"][1].item() == pytest.approx(expected, rel=0.1)


@both
@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_without_gradients_are_reported_once(cls, sparse):
    model = nn.Sequential(nn.Embedding(10, 2, sparse=sparse), nn.Embedding(10, 2))
    groups = [
        {"params": [("rare", model[0].weight)], "kind": "embedding"},
        {"params": [("lazy", model[1].weight)], "kind": "embedding", "lazy": True},
    ]
    optimizer = cls(groups, lr=0.01)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(205):
            optimizer.zero_grad()
            # 9 of 10 rows have a gradient at step 100 only, which breaks the first run.
            tokens = torch.arange(9) if step == 50 else torch.tensor([step % 7])
            (model[0](tokens).sum() + model[1](torch.tensor([0])).sum()).backward()
            found += [(step, name) for name in optimizer.check_embeddings()]
            optimizer.step()
    assert found == [(150, "rare")]
    messages = [str(one.message) for one in caught if "embeddings had no gradient" in str(one.message)]
    assert len(messages) == 1
    assert "more than 20% of the rows" in messages[0]
    assert "rare" in messages[0]
    assert "lazy=('embedding',)" in messages[0]


@both
def test_tables_whose_rows_mostly_get_gradients_are_not_reported(cls):
    embedding = nn.Embedding(10, 2)
    optimizer = cls([{"params": [embedding.weight], "kind": "embedding"}], lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        embedding(torch.arange(8)).sum().backward()  # exactly 20 % without
        assert optimizer.check_embeddings() == []


@both
def test_nothing_to_check_is_an_error(cls):
    optimizer = cls([{"params": [nn.Parameter(torch.ones(2, 2))], "kind": "matrix"}])
    with pytest.raises(RuntimeError, match=r"no parameter group is of kind 'embedding'.*parameter_groups"):
        optimizer.check_embeddings()
