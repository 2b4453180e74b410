"""Every visible pair of query and key is in one call, and no other pair is."""

import pytest
import torch

from danlu.attention._band_calls import Masks, band_calls, call_mask, jobs, tile_calls, tile_mask, visible_spans

# Keys, queries, window.
SIZES = [
    (37, 37, 8),
    (64, 64, 1),
    (50, 50, 50),
    (200, 200, 70),
    (200, 50, 70),
    (200, 50, 160),
    (200, 140, 70),
    (200, 1, 64),
    (300, 299, 3),
    (1, 1, 1),
]


def near_far(keys, queries, window, is_causal):
    """Visibility by band, from the definition."""
    distance = torch.arange(keys)[keys - queries :, None] - torch.arange(keys)
    seen = {"near": distance.abs() < window, "left": distance >= window, "right": distance <= -window}
    return {band: visible & (distance >= 0) if is_causal else visible for band, visible in seen.items()}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("keys", "queries", "window"), SIZES)
def test_every_visible_pair_is_scored_once(keys, queries, window, is_causal):
    seen = {band: torch.zeros(queries, keys, dtype=torch.int64) for band in ("near", "left", "right")}
    mask = tile_mask(window, is_causal, torch.device("cpu")).long()
    for call in band_calls(queries, keys, window, is_causal):
        part = seen[call.band][call.rows, call.keys]
        square = torch.ones_like(part)
        if call.shape == "full":
            part += square
        elif call.shape == "tile":
            part += mask[: part.shape[0], call.mask_from : call.mask_from + part.shape[1]]
        else:
            assert part.shape[0] == part.shape[1]
            part += square.tril() if call.shape == "causal" else square.triu()
    for band, visible in near_far(keys, queries, window, is_causal).items():
        assert torch.equal(seen[band], visible.long()), band


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("keys", "queries", "window"), SIZES)
def test_tiles_cover_the_same(keys, queries, window, is_causal):
    seen = {band: torch.zeros(queries, keys, dtype=torch.int64) for band in ("near", "left", "right")}
    for call in tile_calls(queries, keys, window, is_causal):
        visible = call_mask(call, queries, keys, window, is_causal, Masks(), torch.device("cpu"))
        seen[call.band][call.rows, call.keys] += visible[0, 0]
    for band, visible in near_far(keys, queries, window, is_causal).items():
        assert torch.equal(seen[band], visible.long()), band


def test_spans():
    visible = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    found = {span: samples.tolist() for span, samples in visible_spans(visible).items()}
    assert found == {(1, 3): [0, 3], (0, 4): [1], (0, 0): [2]}
    assert visible_spans(torch.tensor([[1, 0, 1]]).bool()) is None


def test_jobs():
    (everything,) = jobs(4, 6, Masks())
    assert (everything.samples, everything.rows, everything.keys) == (None, slice(0, 4), slice(0, 6))
    left = torch.tensor([[0, 0, 0, 1, 1, 1]]).bool()
    (shifted,) = jobs(4, 6, Masks(left))
    assert (shifted.samples, shifted.rows, shifted.keys, shifted.masked) == (None, slice(1, 4), slice(3, 6), False)
    assert jobs(4, 6, Masks(~left.any(0, keepdim=True) & left)) == []
    for masks in (Masks(left[:, [0, 3, 1, 4, 2, 5]]), Masks(attn_mask=left)):
        assert [job.masked for job in jobs(4, 6, masks)] == [True]
    assert [job.masked for job in jobs(4, 6, Masks(left), spans=False)] == [True]
    packed = jobs(6, 6, Masks(cu_seqlens=torch.tensor([0, 2, 2, 6])))
    assert [(job.rows, job.keys) for job in packed] == [(slice(0, 2),) * 2, (slice(2, 6),) * 2]
