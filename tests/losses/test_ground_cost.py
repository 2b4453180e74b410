"""Costs of the fused EMO: gathered or from a product, with repeated targets, equal to the dense ones."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from danlu.losses import EMO, emo_loss, linear_emo_loss, linear_loss
from danlu.losses._ground_cost import GroundCost, inverse_norms


class Products(TorchDispatchMode):
    """Sizes of the matrix products."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket == torch.ops.aten.mm:
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def problem(classes: int = 11):
    hidden = torch.randn(20, 5, dtype=torch.float64)
    head = torch.randn(classes, 5, dtype=torch.float64)
    return hidden, head, torch.randint(classes, (20,))


def test_the_head_is_read_once_and_repeated_targets_share_a_row():
    hidden, head, _ = problem()
    target = torch.tensor([3, 3, 3, 7] * 5)
    with torch.no_grad(), Products() as seen:
        fused = linear_emo_loss(hidden, head, target, cost_embedding="head", chunk_size=10)
    # One product per chunk: 10 rows of hidden states and 2 different targets.
    assert seen.rows == [12, 12]
    with torch.no_grad(), Products() as seen:
        frozen = linear_emo_loss(hidden, head, target, cost_embedding=head.clone(), chunk_size=10)
    assert seen.rows == [10, 2, 10, 2]
    with torch.no_grad(), Products() as seen:
        same = linear_emo_loss(hidden, head, target, cost_embedding=head, chunk_size=10)
    assert seen.rows == [12, 12]
    expected = emo_loss(hidden @ head.T, target, cost_embedding=head)
    for value in (fused, frozen, same):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_cached_table_has_three_digits_and_needs_no_product():
    hidden, head, target = problem()
    meaning = torch.randn(11, 3, dtype=torch.float64)
    meaning[4] = 0
    loss = EMO(cost_embedding=meaning, mode="pure", cost_cache=True)
    expected = emo_loss(hidden @ head.T, target, cost_embedding=meaning, mode="pure")
    first = linear_loss(hidden, head, target, loss, chunk_size=6)
    torch.testing.assert_close(first, expected, rtol=4e-3, atol=0)
    with torch.no_grad(), Products() as seen:
        again = linear_loss(hidden, head, target, loss, chunk_size=6)
    assert seen.rows == [6, 6, 6, 2]
    assert torch.equal(first, again)
    table = loss.ground_cost.table()
    assert table is not None
    assert table.dtype == torch.bfloat16
    assert (table.diagonal() == 0).all()


@pytest.mark.parametrize("classes", [1, 2, 11])
@pytest.mark.parametrize("kind", ["embedding", "matrix", "head"])
def test_any_number_of_classes(classes, kind):
    hidden, head, target = problem(classes)
    matrix = torch.rand(classes, classes, dtype=torch.float64)
    fused = {"embedding": {"cost_embedding": head.clone()}, "matrix": {"cost_matrix": matrix}}
    options = fused.get(kind, {"cost_embedding": "head"})
    dense = {"cost_matrix": matrix} if kind == "matrix" else {"cost_embedding": head}
    value = linear_emo_loss(hidden, head, target, mode="pure", chunk_size=7, **options)
    torch.testing.assert_close(value, emo_loss(hidden @ head.T, target, mode="pure", **dense), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverse_norms(dtype):
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -0.5]], dtype=dtype)
    assert inverse_norms(rows, torch.float32).tolist() == pytest.approx([0.2, 0.0, 2.0])


def test_a_half_embedding_is_computed_in_the_dtype_of_the_logits():
    hidden, head, target = problem()
    meaning = torch.randn(11, 3)
    value = emo_loss(hidden @ head.T, target, cost_embedding=meaning.bfloat16())
    expected = emo_loss(hidden @ head.T, target, cost_embedding=meaning.bfloat16().double())
    torch.testing.assert_close(value, expected)
    fused = linear_emo_loss(hidden, head, target, cost_embedding=meaning.bfloat16())
    torch.testing.assert_close(fused, expected)


def test_the_graph_of_the_embedding_is_left():
    meaning = torch.randn(4, 2, requires_grad=True)
    assert not GroundCost(embedding=2 * meaning).embedding.requires_grad
