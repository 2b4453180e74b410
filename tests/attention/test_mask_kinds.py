"""Masks by kind: the definitions pair by pair, the flags that replace them, and masks of flex attention."""

import subprocess
import sys

import pytest
import torch

from danlu.attention import attention_mask, block_mask

L = 7


def sees(kind: str, i: int, j: int, prefix: int | None, head: int) -> bool:
    """The definition, of one pair."""
    backward = kind == "backward" or (kind == "forward_backward" and head % 2 == 1)
    if kind == "bidirectional":
        return True
    if kind == "prefix":
        return j <= i or (i < prefix and j < prefix)
    if not backward:
        return j <= i
    border = L if prefix is None else prefix
    return (i <= j < border) if i < border else j <= i


def dense(mask, shape: tuple[int, int]) -> torch.Tensor:
    """What the pair says, as one mask."""
    if mask.attn_mask is not None:
        assert not mask.is_causal
        return mask.attn_mask.expand(*shape, L, L)
    everything = torch.ones(L, L).bool()
    return (everything.tril() if mask.is_causal else everything).expand(*shape, L, L)


CASES = [
    ("causal", None),
    ("bidirectional", None),
    ("backward", None),
    ("forward_backward", None),
    *((kind, prefix) for kind in ("prefix", "backward", "forward_backward") for prefix in (0, 1, 3, 6, 7)),
    *((kind, torch.tensor([0, 7, 4])) for kind in ("prefix", "backward", "forward_backward")),
]


@pytest.mark.parametrize(("kind", "prefix"), CASES, ids=str)
def test_definition(kind, prefix):
    heads = 3 if kind == "forward_backward" else None
    batch = len(prefix) if isinstance(prefix, torch.Tensor) else 1
    found = dense(attention_mask(kind, L, prefix_lengths=prefix, num_heads=heads), (batch, 3))
    for b in range(batch):
        border = prefix[b].item() if isinstance(prefix, torch.Tensor) else prefix
        for head in range(3):
            wanted = [[sees(kind, i, j, border, head) for j in range(L)] for i in range(L)]
            assert found[b, head].tolist() == wanted
    flex = block_mask(kind, L, prefix_lengths=prefix, num_heads=heads, block_size=4)
    index = torch.meshgrid(*(torch.arange(n) for n in (batch, 3, L, L)), indexing="ij")
    assert torch.equal(flex.mask_mod(*index).expand(batch, 3, L, L), found)
    # Blocks of 4 that have nothing visible are left out.
    blocks = torch.nn.functional.pad(found, (0, 1, 0, 1)).unflatten(-1, (2, 4)).unflatten(-3, (2, 4)).any(-1).any(-2)
    assert torch.equal(flex.to_dense().bool().expand(blocks.shape), blocks)


def test_flags_where_they_suffice():
    assert attention_mask("causal", L) == (None, True)
    assert attention_mask("bidirectional", L) == (None, False)
    for kind, heads in (("prefix", None), ("backward", None), ("forward_backward", 2)):
        for prefix in (0, 1):
            assert attention_mask(kind, L, prefix_lengths=prefix, num_heads=heads) == (None, True)
    assert attention_mask("prefix", L, prefix_lengths=L) == (None, False)


def test_padding():
    lengths = torch.tensor([L, 4, 0])
    for kind, prefix in (("causal", None), ("bidirectional", None), ("prefix", 3), ("prefix", torch.tensor([2, 5, 0]))):
        whole = dense(attention_mask(kind, L, prefix_lengths=prefix), (3, 1))
        found = attention_mask(kind, L, prefix_lengths=prefix, lengths=lengths).attn_mask
        inside = torch.arange(L) < lengths[:, None]
        assert torch.equal(found, whole & inside[:, None, :, None] & inside[:, None, None, :])
    assert attention_mask("bidirectional", 0).attn_mask is None
    assert attention_mask("backward", 0).attn_mask.shape == (1, 1, 0, 0)


def test_importing_the_family_does_not_bring_the_compiler():
    code = "import sys, danlu.attention; print('torch.nn.attention.flex_attention' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


TWO = torch.tensor([1, 2])


@pytest.mark.parametrize("function", [attention_mask, block_mask])
@pytest.mark.parametrize(
    ("kind", "length", "options", "error", "match"),
    [
        ("full", 4, {}, ValueError, "kind must be one of 'causal', 'backward'"),
        ("causal", -1, {}, ValueError, "length must be at least"),
        ("causal", 4.0, {}, TypeError, "length must be an int"),
        ("prefix", 4, {}, ValueError, "kind='prefix' needs prefix_lengths"),
        ("prefix", 4, {"prefix_lengths": 5}, ValueError, "prefix_lengths must be at most the length 4, got 5"),
        ("prefix", 4, {"prefix_lengths": -1}, ValueError, "prefix_lengths must be at least 0, got -1"),
        ("prefix", 4, {"prefix_lengths": 2.0}, TypeError, "prefix_lengths must be an int"),
        ("prefix", 4, {"prefix_lengths": TWO + 3}, ValueError, "the length, got values from 4 to 5"),
        ("prefix", 4, {"prefix_lengths": TWO.float()}, TypeError, "prefix_lengths must be an int32 or int64 tensor"),
        ("prefix", 4, {"prefix_lengths": TWO[None]}, ValueError, r"must have shape \(B,\), got \(1, 2\)"),
        ("causal", 4, {"prefix_lengths": 2}, ValueError, "kind='causal' has no prefix"),
        ("bidirectional", 4, {"prefix_lengths": TWO}, ValueError, "kind='bidirectional' has no prefix"),
        ("forward_backward", 4, {}, ValueError, "kind='forward_backward' needs num_heads"),
        ("forward_backward", 4, {"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ("causal", 4, {"num_heads": 2}, ValueError, "all heads of kind='causal' are alike"),
    ],
)
def test_bad_input(function, kind, length, options, error, match):
    with pytest.raises(error, match=match):
        function(kind, length, **options)


def test_bad_lengths():
    with pytest.raises(TypeError, match="lengths must be an int32 or int64 tensor, got list"):
        attention_mask("causal", 4, lengths=[4])
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 4\]"):
        attention_mask("causal", 4, lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="must be of one batch"):
        attention_mask("prefix", 4, prefix_lengths=TWO, lengths=torch.tensor([4, 4, 4]))
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        block_mask("causal", 4, block_size=0)
