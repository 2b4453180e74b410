"""The probe reports what dense attention weights say, and changes no bit of what the model computes."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from danlu.diagnostics import attention_sparsity  # noqa: E402
from danlu.integrations import _attention_rows  # noqa: E402
from danlu.integrations._attention_chart import attention_chart, short_names  # noqa: E402
from danlu.integrations._attention_rows import STATISTICS, RowSample, measure_rows  # noqa: E402
from danlu.integrations._attention_rules import of_block_mask  # noqa: E402
from danlu.integrations.transformers import patch_rope  # noqa: E402
from danlu.integrations.transformers_attention import register_attention  # noqa: E402
from danlu.integrations.transformers_probe import AttentionProbe  # noqa: E402

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER = "model.layers.1.self_attn"


def sharpened(model: nn.Module, factor: float = 15.0) -> nn.Module:
    """Random weights attend evenly; larger ones make a difference."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "query", "key", "in_proj")):
            parameter.data.mul_(factor)
    return model.double().eval()


def llama(implementation: str = "sdpa", **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64, **changes)
    model = sharpened(transformers.LlamaForCausalLM(config))
    model.set_attn_implementation(implementation)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def bert(implementation: str = "sdpa"):
    torch.manual_seed(0)
    model = sharpened(transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=64)))
    model.set_attn_implementation(implementation)
    return model


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(1))


LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
RIGHT = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def expected(weights: Tensor, visible: Tensor, min_keys: int = 2) -> dict[str, Tensor]:
    """Statistics `(H, rows)` from dense weights `(B, H, T, N)`, by the definitions."""
    visible = visible.expand(weights.shape)
    count = visible.sum(-1)
    n_eff = attention_sparsity(weights, mask=visible, kind="n_eff")
    first = visible.int().argmax(-1, keepdim=True)
    rest = attention_sparsity(weights.scatter(-1, first, 0.0), mask=visible.scatter(-1, first, False), kind="n_eff")
    logits = weights.log()
    mean = torch.where(visible, logits, 0.0).sum(-1) / count
    sd = (torch.where(visible, (logits - mean[..., None]).square(), 0.0).sum(-1) / count).sqrt()
    found = {
        "s": attention_sparsity(weights, mask=visible),
        "n_eff": n_eff,
        "n_eff_rest": rest,
        "entropy": attention_sparsity(weights, mask=visible, kind="entropy"),
        "sink": weights.gather(-1, first)[..., 0],
        "logit_sd": sd,
        "gaussian_s": torch.exp(-sd.square() / 2),
    }
    kept = (count >= min_keys)[:, 0].flatten()
    return {name: value.transpose(0, 1).flatten(1)[:, kept] for name, value in found.items()}


def agrees(rows: dict[str, Tensor], dense: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, value in dense.items():
        torch.testing.assert_close(
            rows[name],
            value.float(),
            rtol=tolerance,
            atol=tolerance / 10,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
@pytest.mark.parametrize("make", [llama, bert])
def test_equals_dense_weights_and_outputs_are_bitwise_unchanged(implementation, mask, make):
    model = make(implementation)
    # The eager attention of transformers is NaN in float64 for rows that see nothing.
    exact = implementation == "sdpa"
    model = model if exact else model.float()
    before = model(tokens(), attention_mask=mask)[0]
    probe = AttentionProbe(model)
    with probe:
        inside = model(tokens(), attention_mask=mask)[0]
    after = model(tokens(), attention_mask=mask)[0]
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
    register_attention("danlu_softmax")
    attentions = make("danlu_softmax")(tokens(), attention_mask=mask, output_attentions=True).attentions
    causal = torch.ones(9, 9).tril().bool() if make is llama else torch.ones(9, 9).bool()
    keep = torch.ones(2, 9).bool() if mask is None else mask.bool()
    visible = causal & keep[:, None, None, :] & keep[:, None, :, None]
    assert len(probe.layers) == 2
    for layer, weights in zip(probe.layers, attentions, strict=True):
        agrees(probe.rows(layer), expected(weights, visible), 1e-5 if exact else 1e-3)
    record = probe.records()[0]
    assert record["rows"] + record["skipped"] == 18
    assert record["rows"] == int((visible.sum(-1) >= 2).sum())


def test_layers_heads_and_quantiles():
    model = llama()
    with AttentionProbe(model, select=lambda name: "layers.1" in name, min_keys=4) as probe:
        model(tokens())
        model(tokens(3, 7))
    assert probe.layers == (LAYER,)
    rows = probe.rows(LAYER)
    assert rows["s"].shape == (4, 2 * 6 + 3 * 4)
    records = probe.records(quantiles=(0.0, 0.5, 1.0))
    assert [record["head"] for record in records] == [0, 1, 2, 3]
    for record in records:
        assert (record["rows"], record["skipped"]) == (24, 6 + 9)
        values = rows["n_eff"][record["head"]]
        assert record["n_eff@0"] == values.min()
        assert record["n_eff@1"] == values.max()
        assert record["n_eff@0.5"] == pytest.approx(values.quantile(0.5).item())
    lines = probe.table().splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["layer", "head", "rows", *STATISTICS]
    assert lines[2].split()[:3] == [LAYER, "1", "24"]
    assert float(lines[2].split()[4]) == pytest.approx(records[1]["n_eff@0.5"], rel=1e-3)


def test_tiles_equal_the_whole():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, h, 50, 8, generator=generator, dtype=torch.float64) for h in (4, 2))
    bias = torch.randn(1, 4, 50, 50, generator=generator)
    hidden = torch.rand(2, 1, 50, 50, generator=generator) < 0.3

    def rules(places: Tensor) -> tuple[Tensor, Tensor]:
        causal = torch.ones(50, 50).tril().bool()[places]
        return causal & ~hidden[:, :, places], bias[:, :, places]

    call = {"scale": 0.7, "rules": rules, "min_keys": 2, "softcap": 3.0}
    whole = measure_rows(query, key, is_causal=False, tile=50, **call)
    for tile in (1, 7, 49, None):
        for is_causal in (False, True):
            found = measure_rows(query, key, is_causal=is_causal, tile=tile, **call)
            torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6, equal_nan=True)
    scores = 3 * torch.tanh(query @ key.repeat_interleave(2, 1).transpose(-2, -1) * 0.7 / 3) + bias
    visible = rules(torch.arange(50))[0].expand(scores.shape)
    dense = scores.masked_fill(~visible, -math.inf).softmax(-1)
    torch.testing.assert_close(whole[0], attention_sparsity(dense, mask=visible), rtol=1e-9, atol=0, equal_nan=True)
    mean = torch.stack([scores[0, 1, i][visible[0, 1, i]].mean() for i in range(5, 50)])
    torch.testing.assert_close(whole[STATISTICS.index("logit_mean"), 0, 1, 5:], mean, rtol=1e-9, atol=1e-9)
    half = measure_rows(query.bfloat16(), key.bfloat16(), is_causal=True, **call)
    assert half.dtype == torch.float32


def test_a_share_of_the_rows_is_some_of_them():
    model = llama()
    whole, part = AttentionProbe(model), AttentionProbe(model, share=0.3)
    calls = 25
    for probe in (whole, part):
        with probe:
            for i in range(calls):
                model((tokens() + i % 3) % 40)
    assert part.records()[0]["rows"] + part.records()[0]["skipped"] == pytest.approx(0.3 * 18 * calls, abs=2 * calls)
    # Up to rounding, which depends on the tile.
    some, every = (probe.rows(LAYER)["n_eff"].T for probe in (part, whole))
    assert (some[:, None] - every).abs().amax(-1).amin(1).max() < 1e-4
    # Calls of one row are looked at now and then.
    drawn = [len(part._drawn(1)) for _ in range(200)]
    assert set(drawn) == {0, 1}
    assert sum(drawn) == pytest.approx(60, abs=4 * math.sqrt(200 * 0.3 * 0.7))


def test_a_bias_that_hides_is_a_mask():
    model = llama()
    module = model.model.layers[1].self_attn
    query, key = torch.randn(2, 1, 4, 9, 8, dtype=torch.float64)
    hidden = torch.ones(9, 9).triu(1).bool()
    bias = torch.randn(1, 4, 9, 9, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float64).min)
    probe = AttentionProbe(model)
    probe._observe_transformers(module, query, key, None, {"position_bias": bias, "is_causal": False})
    scores = query @ key.transpose(-2, -1) * 8**-0.5 + bias
    agrees(probe.rows(LAYER), expected(scores.masked_fill(hidden, -math.inf).softmax(-1), ~hidden))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_rows_of_every_sharpness_keep_their_digits(scale):
    """In float32 beside float64: nearly even rows, and rows of which the first or another key has nearly all."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 40, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    key[:, 1, 0] = 3 * query[:, 1].mean(1)
    # What is hidden may be anything.
    key[:, :, 33:] = math.nan
    visible = torch.arange(40) < 33

    def measured(dtype: torch.dtype) -> Tensor:
        given = query.to(dtype), key.to(dtype)
        return measure_rows(
            *given, scale=scale, rules=lambda places: (visible[None], None), is_causal=False, min_keys=2
        )

    exact = measured(torch.float64)
    assert exact.isfinite().all()
    scores = query @ key[:, :, :33].transpose(-2, -1) * scale
    dense = expected(scores.softmax(-1), torch.ones(40, 33).bool())
    # Not from weights, of which some are 0.
    moments = {"logit_mean": scores.mean(-1), "logit_sd": scores.std(-1, correction=0)}
    dense |= {name: value[0] for name, value in moments.items()}
    del dense["gaussian_s"]
    for name, value in dense.items():
        found = exact[STATISTICS.index(name)].transpose(0, 1).flatten(1)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-10)
    # Scores of 100 are rounded to 1e-5 themselves.
    torch.testing.assert_close(measured(torch.float32).double(), exact, rtol=1e-3 if scale > 1 else 1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return out


def test_no_square_matrix_is_held(monkeypatch):
    monkeypatch.setitem(_attention_rows._TILE_ELEMENTS, "cpu", 2**14)
    model = llama().float()
    model.config.max_position_embeddings = 512
    with AttentionProbe(model, select=lambda name: "layers.0" in name) as probe:
        module = model.model.layers[0].self_attn
        query, key = torch.randn(1, 4, 512, 8), torch.randn(1, 2, 512, 8)
        with Largest() as largest:
            probe._observe_transformers(module, query, key, None, {})
    # A tile of 8 rows has 4 * 8 * 512 = 2**14 scores, and there is room for two; the square would have 2**20.
    assert largest.elements <= 2**15
    assert probe.records()[0]["rows"] == 511


def test_decoding_grows_the_keys():
    model = llama()
    with AttentionProbe(model) as probe:
        grown = model.generate(tokens(1), max_new_tokens=4, do_sample=False)
    with AttentionProbe(model) as whole:
        model(grown[:, :-1])
    for name in STATISTICS:
        torch.testing.assert_close(
            probe.rows(LAYER)[name], whole.rows(LAYER)[name], rtol=1e-5, atol=1e-6, equal_nan=True
        )


def test_training_gradients_and_random_numbers_are_unchanged():
    results = []
    for watched in (False, True):
        model = llama(attention_dropout=0.3).train()
        torch.manual_seed(5)
        context = AttentionProbe(model) if watched else torch.enable_grad()
        with context:
            model(tokens(), labels=tokens()).loss.backward()
        results.append([p.grad.clone() for p in model.parameters()] + [torch.get_rng_state()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_the_table_of_functions_is_restored():
    own = register_attention("danlu_test_softmax", lambda scores, *, dim: scores.softmax(dim))
    ALL_ATTENTION_FUNCTIONS["local"] = own
    try:
        before = dict(ALL_ATTENTION_FUNCTIONS)
        first, second = llama(), bert()
        with AttentionProbe(first) as outer, AttentionProbe(second) as inner:
            first(tokens())
            second(tokens())
            llama()(tokens())
        assert dict(ALL_ATTENTION_FUNCTIONS) == before
        assert "eager" not in ALL_ATTENTION_FUNCTIONS
        # What is registered later is not hidden by an old entry.
        register_attention("danlu_test_softmax", lambda scores, *, dim: scores.softmax(dim))
        assert ALL_ATTENTION_FUNCTIONS["danlu_test_softmax"] is not own
        assert len(outer.layers) == len(inner.layers) == 2
        # Other models of the process are not looked at.
        assert outer.records()[0]["rows"] == 16
    finally:
        del ALL_ATTENTION_FUNCTIONS["local"]
    model = llama()
    with pytest.raises(ZeroDivisionError), AttentionProbe(model):
        raise ZeroDivisionError
    assert dict(ALL_ATTENTION_FUNCTIONS).keys() >= before.keys() - {"local"}
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


def test_a_probe_can_be_opened_again_but_not_twice_at_once():
    model = llama()
    probe = AttentionProbe(model)
    for _ in range(2):
        with probe:
            model(tokens())
    assert probe.records()[0]["rows"] == 32
    with probe, pytest.raises(RuntimeError, match="under a probe already"), probe:
        pass
    attention = nn.MultiheadAttention(8, 2)
    with AttentionProbe(attention), pytest.raises(RuntimeError, match="under a probe already"):
        AttentionProbe(attention).__enter__()


def test_sliding_windows_and_masks_of_two_axes():
    """As the flash functions get them: a padding mask or none, and the window as an option."""
    model = llama()
    module = model.model.layers[1].self_attn
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, h, 9, 8, generator=generator, dtype=torch.float64) for h in (4, 2))
    scores = query @ key.repeat_interleave(2, 1).transpose(-2, -1) * 8**-0.5
    distance = torch.arange(9)[:, None] - torch.arange(9)
    for mask, window, causal in ((None, 3, True), (RIGHT, None, True), (LEFT, 4, True), (RIGHT, 2, False)):
        probe = AttentionProbe(model)
        probe._observe_transformers(module, query, key, mask, {"sliding_window": window, "is_causal": causal})
        visible = (distance >= 0) if causal else torch.ones(9, 9).bool()
        if window:
            visible = visible & (distance.abs() < window)
        if mask is not None:
            visible = visible & mask.bool()[:, None, None, :] & mask.bool()[:, None, :, None]
        visible = visible.expand(2, 1, 9, 9)
        dense = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()
        agrees(probe.rows(LAYER), expected(dense, visible))


def test_masks_of_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask

    padding = LEFT.bool()
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & padding[b, j], 2, None, 9, 9, device="cpu")
    query = torch.zeros(2, 4, 9, 8)
    found = torch.cat([of_block_mask(mask, query, torch.arange(low, low + 3), 9) for low in (0, 3, 6)], dim=2)
    wanted = torch.ones(9, 9).tril().bool() & padding[:, None, None, :]
    assert torch.equal(found, wanted.expand(2, 4, 9, 9))


def test_biased_scores_and_softcaps():
    model = llama()
    module = model.model.layers[1].self_attn
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 9, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(1, 4, 9, 9, generator=generator, dtype=torch.float64)
    additive = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    probe = AttentionProbe(model)
    options = {"softcap": 2.0, "scaling": 0.5, "position_bias": bias}
    probe._observe_transformers(module, query, key, additive, options)
    scores = 2 * torch.tanh(query @ key.transpose(-2, -1) * 0.5 / 2) + bias
    visible = torch.ones(9, 9).tril().bool()
    dense = scores.masked_fill(~visible, -math.inf).softmax(-1)
    agrees(probe.rows(LAYER), expected(dense, visible[None, None]))


# ---- nn.MultiheadAttention ------------------------------------------------------------------------------------------


def dense_torch(attention: nn.MultiheadAttention, *args, **kwargs) -> Tensor:
    return attention(*args, **kwargs, need_weights=True, average_attn_weights=False)[1]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention(batch_first, kdim, bias):
    attention = sharpened(nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim, bias=bias), 3)
    query = torch.randn(3, 6, 8, dtype=torch.float64)
    memory = torch.randn(3, 7, kdim or 8, dtype=torch.float64)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    hidden = torch.zeros(3, 7).bool()
    hidden[1, 4:] = True
    for need_weights in (True, False):
        before = attention(query, memory, memory, key_padding_mask=hidden, need_weights=need_weights)
        with AttentionProbe(attention) as probe:
            inside = attention(query, memory, memory, key_padding_mask=hidden, need_weights=need_weights)
        assert torch.equal(before[0], inside[0])
        weights = dense_torch(attention, query, memory, memory, key_padding_mask=hidden)
        assert probe.layers == ("",)
        agrees(probe.rows(""), expected(weights, ~hidden[:, None, None, :]))


def test_multihead_attention_masks_of_every_form():
    attention = sharpened(nn.MultiheadAttention(8, 2, batch_first=True), 3)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    future = torch.ones(6, 6).triu(1).bool()
    by_head = torch.rand(6, 6, 6) < 0.2
    by_head[:, range(6), range(6)] = False
    additive = torch.randn(6, 6, dtype=torch.float64).masked_fill(future, -math.inf)
    for mask, visible in (
        (future, ~future),
        (additive, ~future),
        (by_head, ~by_head.view(3, 2, 6, 6)),
    ):
        with AttentionProbe(attention) as probe:
            attention(x, x, x, attn_mask=mask)
        weights = dense_torch(attention, x, x, x, attn_mask=mask)
        dense = expected(weights, visible.expand(3, 2, 6, 6))
        if mask is not by_head:
            agrees(probe.rows(""), dense)
        else:
            assert sum(record["rows"] for record in probe.records()) == int((visible.sum(-1) >= 2).sum())
            n_eff = attention_sparsity(weights, mask=visible, kind="n_eff").transpose(0, 1).flatten(1)
            found = probe.rows("")["n_eff"]
            for head in range(2):
                torch.testing.assert_close(
                    found[head][~found[head].isnan()], n_eff[head][~n_eff[head].isnan()].float(), rtol=1e-5, atol=0
                )
    with AttentionProbe(attention) as probe:
        attention(x[0], x[0], x[0])
    agrees(probe.rows(""), expected(dense_torch(attention, x[:1], x[:1], x[:1]), torch.ones(6, 6).bool()))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoder_layers_keep_their_fused_form(norm_first, padded, grad, monkeypatch):
    """Without gradients torch's layer does not call its attention, and with hooks it would: in other kernels."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = sharpened(nn.TransformerEncoder(layer, 2)).float()
    x = torch.randn(3, 6, 16)
    hidden = torch.zeros(3, 6).bool()
    hidden[1, 4:] = True
    mask = hidden if padded else None
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fused(*a))
    with torch.set_grad_enabled(grad):
        before = model(x, src_key_padding_mask=mask)
        with AttentionProbe(model) as probe:
            inside = model(x, src_key_padding_mask=mask)
    assert torch.equal(before, inside)
    assert len(calls) == (0 if grad else 4)
    assert probe.layers == ("layers.0.self_attn", "layers.1.self_attn")
    assert probe.records()[0]["rows"] == (16 if padded else 18)
    assert not any("forward" in vars(module) for module in model.modules())
    first = model.layers[0]
    y = first.norm1(x) if norm_first else x
    weights = dense_torch(first.self_attn, y, y, y, key_padding_mask=mask).double()
    visible = ~(hidden & padded)
    dense = expected(weights, visible[:, None, None] & visible[:, None, :, None])
    agrees(probe.rows("layers.0.self_attn"), {name: dense[name] for name in ("s", "n_eff", "entropy", "sink")}, 1e-3)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_the_sample_is_uniform_and_its_counts_exact():
    sample = RowSample(500, 1)
    for part in torch.arange(20_000.0).split(37):
        sample.add(part[None, None, None].expand(len(STATISTICS), 1, 1, -1))
    assert sample.rows.tolist() == [20_000]
    kept = sample.values[:, 0, 0]
    assert len(kept) == len(kept.unique()) == 500
    # Mean and quartiles of 500 uniform draws, to four standard deviations.
    assert kept.mean().item() == pytest.approx(10_000, abs=4 * 20_000 / math.sqrt(12 * 500))
    assert kept.quantile(0.25).item() == pytest.approx(5_000, abs=4 * 20_000 * math.sqrt(0.1875 / 500))


def test_the_first_visible_key_is_the_sink():
    model = llama()
    with AttentionProbe(model) as probe:
        model(tokens()[1:, 4:])
    with AttentionProbe(model) as padded:
        model(tokens(), attention_mask=LEFT)
    torch.testing.assert_close(padded.rows(LAYER)["sink"][:, -4:], probe.rows(LAYER)["sink"], rtol=1e-5, atol=1e-6)


def test_plot():
    pytest.importorskip("vl_convert")
    model = llama()
    with AttentionProbe(model) as probe:
        model(tokens())
    for statistic in ("n_eff", "sink"):
        figure = probe.plot(statistic)
        assert figure.startswith("<svg")
        assert "model.layers.*.self_attn" in figure
        assert statistic in figure
        # A cell by layer and head, with the medians of the records.
        above, below = attention_chart(statistic, probe._found)["vconcat"]
        cells = {(cell["layer"], cell["head"]): cell["value"] for cell in below["data"]["values"]}
        wanted = {
            (record["layer"].split(".")[2], record["head"]): record[f"{statistic}@0.5"] for record in probe.records()
        }
        assert cells == pytest.approx(wanted)
        assert figure.count("self_attn: 1; head: ") == 4
        assert [span["layer"] for span in above["layer"][0]["data"]["values"]] == ["0", "1"]
        assert all(span["low"] <= span["high"] for span in above["layer"][0]["data"]["values"])


@pytest.mark.parametrize(
    ("names", "labels", "pattern"),
    [
        (["model.layers.0.self_attn", "model.layers.11.self_attn"], ["0", "11"], "model.layers.*.self_attn"),
        (["a.0.x", "a.1.y"], ["0.x", "1.y"], "a.*"),
        (["encoder.0", "decoder.0"], ["encoder", "decoder"], "*.0"),
        (["a", "b.c"], ["a", "b.c"], "*"),
        (["a.b"], ["a.b"], "layer"),
        ([""], ["model"], "layer"),
    ],
)
def test_names_in_plots(names, labels, pattern):
    assert short_names(names) == (labels, pattern)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: AttentionProbe("model"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: AttentionProbe(nn.Linear(2, 2)), ValueError, "Linear has no attention to look at"),
        (lambda: AttentionProbe(llama(), select="layers.0"), TypeError, "select must be a function"),
        (lambda: AttentionProbe(llama(), min_keys=1), ValueError, "min_keys must be at least 2, got 1"),
        (lambda: AttentionProbe(llama(), sample=0), ValueError, "sample must be at least 1"),
        (lambda: AttentionProbe(llama(), tile=0), ValueError, "tile must be at least 1"),
        (lambda: AttentionProbe(llama(), share=0.0), ValueError, "share must be in"),
        (lambda: AttentionProbe(llama(), share=1.5), ValueError, "share must be in"),
        (lambda: AttentionProbe(nn.MultiheadAttention(4, 2, add_bias_kv=True)), ValueError, "add_bias_kv"),
        (lambda: AttentionProbe(nn.MultiheadAttention(4, 2, add_zero_attn=True)), ValueError, "no tokens"),
        (lambda: AttentionProbe(llama()).rows("x"), ValueError, "layer must be one of"),
        (lambda: AttentionProbe(llama()).plot(), ValueError, "no attention has run under the probe"),
        (lambda: AttentionProbe(llama()).plot("S"), ValueError, "statistic must be one of 's'"),
        (lambda: AttentionProbe(llama()).records(quantiles=(50,)), ValueError, "quantiles must be in"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_attention_that_is_no_softmax_of_its_products_is_refused():
    model = llama()
    handle = patch_rope(model)
    with pytest.raises(ValueError, match="'danlu_rerope' is not a softmax"):
        AttentionProbe(model)
    handle.remove()
    AttentionProbe(model)


def test_compiled_modules_are_looked_at_outside_of_the_graph():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected_rows = AttentionProbe(attention)
    with expected_rows:
        attention(x, x, x)
    with AttentionProbe(attention) as probe:
        torch.compile(attention, backend="eager")(x, x, x)
    torch.testing.assert_close(probe.rows("")["s"], expected_rows.rows("")["s"])
