"""The training step equals the plain loop, whatever precision, scale, accumulation, clipping and compilation do."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import danlu.precision._compile as compile_module
from danlu.optim import Lion, Tiger, parameter_groups
from danlu.precision import StepRecord, TrainStep

VOCABULARY = 100


class Transformer(nn.Module):
    """Two layers over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.layers(self.embedding(tokens)))


def token_loss(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (4, 17), generator=generator) for _ in range(count)]


def square_loss(model, x):
    return model(x).square().mean()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def inputs(step) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step))


def values(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def adamw(model, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_layer_transformer_after_eight_steps_is_within_a_thousandth_of_float32(precision):
    found = {}
    for mode in ("fp32", precision):
        torch.manual_seed(0)
        model = Transformer()
        step = TrainStep(model, token_loss, torch.optim.AdamW(model.parameters(), lr=1e-4), precision=mode)
        losses = [step(batch) for batch in batches(8)]
        found[mode] = float(losses[-1][0])
        assert all(record.updated for _, record in losses)
    assert 4 < found["fp32"] < 5
    assert found[precision] != found["fp32"]
    assert found[precision] == pytest.approx(found["fp32"], rel=1e-3)


def test_float32_equals_the_plain_loop_bit_for_bit():
    first, second = net(), net()
    plain, step = adamw(first), TrainStep(second, square_loss, adamw(second))
    for index in range(4):
        plain.zero_grad()
        loss = square_loss(first, inputs(index))
        loss.backward()
        plain.step()
        found, record = step(inputs(index))
        assert torch.equal(found, loss.detach())
        assert not found.requires_grad
        assert (record.scale, record.updated, record.skipped) == (1.0, True, False)
    assert same(values(first), values(second))


@pytest.mark.parametrize("outer", [False, True])
def test_bf16_equals_the_plain_loop_bit_for_bit(outer):
    """Without the cache of casts, which must not serve the weights of the step before, whatever is around it."""
    found = []
    for plain in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        step = TrainStep(model, square_loss, optimizer, precision="bf16")
        losses = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer, cache_enabled=not plain):
            for index in range(5):
                if plain:
                    optimizer.zero_grad()
                    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                        loss = square_loss(model, inputs(index)).float()
                    with torch.autocast("cpu", enabled=False):
                        loss.backward()
                        optimizer.step()
                else:
                    loss, _ = step(inputs(index))
                losses.append(float(loss.detach()))
        found.append((losses, values(model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("loss_scale", [None, 1000.0, "dynamic"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_scale_times_accumulation_times_clip(precision, loss_scale):
    """Against float32 on the whole batch: three micro-batches of equal size, clipped to a fifth of their norm."""
    first, second = net(), net()
    plain = torch.optim.SGD(first.parameters(), lr=0.5)
    bound = 0.05
    step = TrainStep(
        second,
        square_loss,
        torch.optim.SGD(second.parameters(), lr=0.5),
        precision=precision,
        loss_scale=loss_scale,
        grad_accum=3,
        clip_norm=bound,
    )
    tolerance = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 2e-3}[precision]
    for cycle in range(3):
        micro = [inputs(10 * cycle + i) for i in range(3)]
        plain.zero_grad()
        square_loss(first, torch.cat(micro)).backward()
        norm = nn.utils.clip_grad_norm_(first.parameters(), bound)
        assert norm > bound
        plain.step()
        records = [step(x)[1] for x in micro]
        assert [record.updated for record in records] == [False, False, True]
        assert [record.grad_norm is None for record in records] == [True, True, False]
        torch.testing.assert_close(records[-1].grad_norm, norm, rtol=tolerance, atol=tolerance)
        # What the optimizer saw is clipped, and not scaled.
        seen = torch.nn.utils.get_total_norm([p.grad for p in second.parameters()])
        torch.testing.assert_close(seen, torch.tensor(bound), rtol=1e-3, atol=0.0)
    for mine, theirs in zip(values(second), values(first), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("precision", "loss_scale"), [("fp16", "dynamic"), ("fp16", 1000.0), ("fp32", None)])
def test_a_skip_keeps_optimizer_scheduler_and_accumulation_in_step(precision, loss_scale):
    model = net()
    optimizer = adamw(model, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = TrainStep(
        model, square_loss, optimizer, precision=precision, loss_scale=loss_scale, grad_accum=2, scheduler=scheduler
    )
    step(inputs(0))
    _, good = step(inputs(1))
    assert good.updated
    params, rate, scale = values(model), optimizer.param_groups[0]["lr"], step.scale
    state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    # The bad micro-batch is the first of its cycle; the whole cycle goes.
    step(inputs(2) * math.inf)
    _, bad = step(inputs(3))
    assert (bad.updated, bad.skipped) == (False, True)
    assert not bad.grad_norm.isfinite()
    assert same(values(model), params)
    assert same([value for entry in optimizer.state.values() for value in entry.values()], state)
    assert optimizer.param_groups[0]["lr"] == rate
    assert scheduler.last_epoch == 1
    assert step.scale == (scale / 2 if loss_scale == "dynamic" else scale)
    records = [step(inputs(4))[1], step(inputs(5))[1]]
    assert [record.updated for record in records] == [False, True]
    assert scheduler.last_epoch == 2
    assert all(p.isfinite().all() for p in model.parameters())
    assert not same(values(model), params)


def test_raise_names_the_parameters_and_changes_nothing():
    model = net()
    step = TrainStep(model, square_loss, adamw(model), on_nonfinite="raise")
    before = values(model)

    hook = model[0].weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(RuntimeError, match=r"nothing was updated .*parameters: 0\.weight$"):
        step(inputs(0))
    assert same(values(model), before)
    hook.remove()
    assert step(inputs(0))[1].updated


def test_a_dynamic_scale_skips_even_with_raise_until_it_is_one():
    model = net()
    step = TrainStep(model, square_loss, adamw(model), precision="fp16", on_nonfinite="raise")
    for expected in (2.0**k for k in range(16, 0, -1)):
        _, record = step(inputs(0) * math.inf)
        assert (record.skipped, record.scale) == (True, expected)
    with pytest.raises(RuntimeError, match="precision='fp16', scale 1"):
        step(inputs(0) * math.inf)


def test_a_dynamic_scale_goes_on_after_an_error_at_the_end_of_a_cycle():
    model = net()
    step = TrainStep(model, square_loss, adamw(model), loss_scale="dynamic", on_nonfinite="raise")
    step.load_state_dict({"scale": 1.0, "scaler": {**step.state_dict()["scaler"], "scale": 1.0}})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="nothing was updated"):
            step(inputs(0) * math.inf)
    assert step(inputs(0))[1].updated
    assert step.scale == 1.0

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyError("stop")

    model = net()
    step = TrainStep(model, square_loss, Fails(model.parameters(), lr=0.1), loss_scale="dynamic")
    for _ in range(2):
        with pytest.raises(KeyError):
            step(inputs(0))


@pytest.mark.parametrize("loss_scale", [None, 1024.0, "dynamic"])
def test_sparse_gradients_are_unscaled_and_clipped(loss_scale):
    found = []
    tokens = torch.tensor([1, 2, 1, 4])
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(6, 3, sparse=sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        step = TrainStep(model, square_loss, optimizer, loss_scale=loss_scale, clip_norm=0.1, on_nonfinite="raise")
        records = [step(tokens)[1] for _ in range(2)]
        assert all(record.updated and record.grad_norm > 0.1 for record in records)
        found.append((model.weight.detach(), records[-1].grad_norm))
        if loss_scale != "dynamic":
            step._loss_fn = lambda model, tokens: square_loss(model, tokens) * math.nan
            with pytest.raises(RuntimeError, match=r"parameters: weight$"):
                step(tokens)
    torch.testing.assert_close(found[0], found[1])


def test_static_scale_and_no_scale_take_the_same_steps_in_float32():
    """A power of two scales and unscales without rounding."""
    found = []
    for loss_scale in (None, 1024.0, "dynamic"):
        model = net()
        step = TrainStep(model, square_loss, adamw(model), loss_scale=loss_scale)
        for index in range(5):
            step(inputs(index))
        found.append(values(model))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


# ------------------------------------------------------------------------------------------------- nested contexts


def test_outer_autocast_neither_leaks_in_nor_serves_old_weights():
    def losses(outer, precision):
        model = net()
        step = TrainStep(model, square_loss, torch.optim.SGD(model.parameters(), lr=0.5), precision=precision)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            return [float(step(inputs(index))[0]) for index in range(5)], values(model)

    for precision in ("fp32", "bf16"):
        (plain, weights), (nested, nested_weights) = losses(False, precision), losses(True, precision)
        assert plain == nested
        assert same(weights, nested_weights)


def test_inner_float32_island_is_respected():
    seen = []

    class Island(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            seen.append(self.linear(x).dtype)
            with torch.autocast("cpu", enabled=False):
                y = self.linear(x)
            seen.append(y.dtype)
            return y

    model = Island()
    TrainStep(model, square_loss, adamw(model), precision="bf16")(inputs(0))
    assert seen == [torch.bfloat16, torch.float32]
    assert model.linear.weight.dtype == torch.float32


@pytest.mark.parametrize(("precision", "inside"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "medium")])
def test_precision_of_products_is_set_inside_and_restored_even_after_an_error(precision, inside):
    seen = []

    def loss(model, x):
        seen.append(torch.get_float32_matmul_precision())
        if len(seen) == 2:
            raise KeyError("stop")
        return square_loss(model, x)

    model = net()
    step = TrainStep(model, loss, adamw(model), precision=precision)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        step(inputs(0))
        with pytest.raises(KeyError):
            step(inputs(1))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [inside, inside]


def test_auto_is_a_mode_that_runs_here():
    model = net()
    step = TrainStep(model, square_loss, adamw(model), precision="auto")
    assert step.precision in ("fp32", "bf16", "fp16")
    assert step(inputs(0))[1].updated


def test_half_losses_are_widened_before_they_are_scaled():
    model = net()
    step = TrainStep(
        model, lambda model, x: model(x).sum(), torch.optim.SGD(model.parameters(), lr=1e-6), precision="fp16"
    )
    loss, record = step(inputs(0))
    # 65536 times a half loss above 1 would be infinite.
    assert loss.dtype == torch.float32
    assert record.scale == 65536.0
    assert abs(float(loss)) > 1


# ----------------------------------------------------------------------------------------------- failure of float16


class Reduced(nn.Module):
    """Weights stored a factor larger than they act, so that their gradients are that factor smaller."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(16, 16) * 0.1 * factor)

    def forward(self, x):
        # Dividing the input, not the output: the gradient that reaches the weight is small from the product on.
        return (x / self.factor) @ self.weight.t()


@pytest.mark.parametrize(
    ("precision", "loss_scale", "learns"),
    [("fp32", None, True), ("fp16", None, False), ("fp16", 1000.0, True), ("fp16", "dynamic", True)],
)
def test_gradients_below_1e_8_stall_in_fp16_unless_the_loss_is_scaled(precision, loss_scale, learns):
    """Failure 2 of the article. A sign optimizer, so that the size of a gradient matters only where it is lost."""
    model = Reduced(64.0)
    optimizer = Lion(model.parameters(), lr=0.1)
    teacher = torch.randn(16, 16, generator=torch.Generator().manual_seed(5)) * 0.3

    def loss(model, x):
        # A small share of a large objective.
        return (model(x).float() - x @ teacher.t()).square().mean() * 1e-6

    step = TrainStep(model, loss, optimizer, precision=precision, loss_scale=loss_scale)
    before = model.weight.detach().clone()
    found = []
    for index in range(120):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(index))
        found.append(float(step(x)[0]))
        if index == 0 and precision == "fp32":
            assert 0 < model.weight.grad.abs().max() < 1e-8
    if learns:
        assert found[-1] < 0.5 * found[0]
    else:
        assert torch.equal(model.weight, before)


# -------------------------------------------------------------------------------------------------- facts about Adam


def trajectory(make_optimizer, scale, steps=20, curvature=1.0):
    """Float64 trajectory with the gradients of the loss times `scale`, never unscaled; they are of size 1e-8."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = make_optimizer([w])
    slope = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        ((curvature * w.square().sum() / 2 + w @ slope) * 1e-8 * scale).backward()
        optimizer.step()
    return w.detach().clone()


@pytest.mark.parametrize("curvature", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1000.0, 1024.0])
def test_scaling_the_loss_is_dividing_adams_eps(scale, curvature):
    def adam(eps, scale):
        return trajectory(lambda p: torch.optim.Adam(p, lr=1e-3, eps=eps), scale, curvature=curvature)

    assert (adam(1e-8, scale) - adam(1e-8 / scale, 1.0)).abs().max() <= 1e-15


def test_adams_eps_is_why_scaling_seems_to_help_in_float32():
    """Constant gradients of the size of eps: 1 / (1 + 1) of a full step without, 1 / (1 + 1/1000) with the scale."""
    start = trajectory(lambda p: torch.optim.SGD(p, lr=0.0), 1.0)
    moved = [
        (trajectory(lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-8), scale, curvature=0.0) - start).norm()
        for scale in (1.0, 1000.0)
    ]
    assert moved[1] / moved[0] == pytest.approx(2 / 1.001, rel=1e-6)


@pytest.mark.parametrize("scale", [1000.0, 1024.0, 1e6])
@pytest.mark.parametrize(
    "make", [lambda p: Lion(p, lr=1e-3, weight_decay=0.1), lambda p: Tiger([{"params": p, "kind": "vector"}], lr=1e-3)]
)
def test_sign_optimizers_do_not_see_the_scale(make, scale):
    assert torch.equal(trajectory(make, scale), trajectory(make, 1.0))


# ------------------------------------------------------------------------------------------------------- compilation


def test_compiled_step_equals_the_eager_one():
    found = []
    for compile in (False, {"backend": "aot_eager", "fullgraph": True}):
        torch.manual_seed(0)
        model = Transformer()
        step = TrainStep(model, token_loss, adamw(model), precision="bf16", compile=compile, clip_norm=1.0)
        found.append([float(step(batch)[0]) for batch in batches(6)])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    report = step.compile_report
    assert (report.kept, report.reason, report.graph_breaks) == ("compiled", "as asked for", {})
    assert report.compile_seconds > 0
    assert report.compiled_seconds > 0
    assert TrainStep(net(), square_loss, adamw(net())).compile_report.kept == "eager"


def test_graph_breaks_are_reported():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            torch._dynamo.graph_break()
            return y * 2

    model = Breaks()
    step = TrainStep(model, square_loss, adamw(model), compile={"backend": "eager"})
    step(inputs(0))
    assert sum(step.compile_report.graph_breaks.values()) >= 1


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_a_failing_compiler_is_a_warning_and_the_step_is_done(fails_in):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no code for this backward")

    def backend(graph, examples):
        if fails_in == "forward":
            raise RuntimeError("no code for this forward")
        return lambda *arguments: tuple(Fails.apply(one) for one in graph(*arguments))

    first, second = net(), net()
    plain = TrainStep(first, square_loss, adamw(first))
    step = TrainStep(second, square_loss, adamw(second), compile={"backend": backend})
    plain(inputs(0))
    with pytest.warns(UserWarning, match=f"torch.compile failed and the model runs without it .*this {fails_in}"):
        assert step(inputs(0))[1].updated
    assert step.compile_report.kept == "eager"
    assert "the compiler failed" in step.compile_report.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(inputs(1))
        step(inputs(1))
    assert same(values(first), values(second))


def test_a_failing_compiler_leaves_no_trace_in_buffers_and_random_numbers():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no code for this backward")

    def backend(graph, examples):
        return lambda *arguments: tuple(Fails.apply(one) if one.requires_grad else one for one in graph(*arguments))

    found = []
    for compile in (False, {"backend": backend}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        step = TrainStep(model, square_loss, adamw(model), compile=compile)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(inputs(0))
        found.append([value.clone() for value in model.state_dict().values()])
    assert step.compile_report.kept == "eager"
    assert same(*found)


def test_an_error_of_the_model_is_the_models():
    model = net()
    step = TrainStep(model, square_loss, adamw(model), compile={"backend": "eager"})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(torch.ones(2, 7))


class Clock:
    """Stands for the module `time`; models let it go on, so that no busy machine can spoil a measurement."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("compile_seconds", "fast_seconds", "total", "kept", "break_even"),
    [
        (100.0, 1.0, 104, "compiled", 99),
        (100.0, 1.0, 102, "eager", 99),
        (5.0, 1.0, 400, "compiled", 4),
        (1.0, 2.5, 400, "eager", math.inf),
    ],
)
def test_auto_keeps_what_pays(monkeypatch, compile_seconds, fast_seconds, total, kept, break_even):
    """With a compiler of known cost and gain, on a model that takes 2 seconds without it."""
    clock, model = Clock(), net()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            clock.now += 2.0
            return self.net(x)

    def compiler(slow, **options):
        calls = []

        def call(x):
            calls.append(1)
            clock.now += compile_seconds if len(calls) == 1 else fast_seconds
            return slow.net(x)

        return call

    monkeypatch.setattr(compile_module, "time", clock)
    monkeypatch.setattr(compile_module.torch, "compile", compiler)
    step = TrainStep(Slow(), square_loss, adamw(model), compile="auto", total_steps=total)
    # Four calls without the compiler, the one that compiles, and four more.
    for index in range(9):
        assert step.compile_report.kept == "undecided"
        step(inputs(index))
    report = step.compile_report
    assert (report.kept, report.break_even) == (kept, break_even)
    assert (report.eager_seconds, report.compiled_seconds) == (2.0, fast_seconds)
    assert report.compile_seconds == max(0.0, compile_seconds - fast_seconds)
    assert f"{total - 4} that remained" in report.reason
    before = clock.now
    step(inputs(9))
    assert clock.now - before == (fast_seconds if kept == "compiled" else 2.0)


@pytest.mark.slow
def test_auto_with_inductor():
    model = net()
    step = TrainStep(model, square_loss, adamw(model), compile="auto", total_steps=20)
    for index in range(10):
        step(inputs(index))
    # Compiling takes seconds and a step microseconds.
    assert step.compile_report.kept == "eager"
    assert "beyond the 16 that remained" in step.compile_report.reason


# -------------------------------------------------------------------------------------------------- state and errors


def test_state_goes_on_bit_for_bit():
    def fresh():
        model = net()
        optimizer = adamw(model)
        return model, optimizer, TrainStep(model, square_loss, optimizer, precision="fp16", grad_accum=2)

    model, optimizer, step = fresh()
    for index in range(6):
        step(inputs(index) * (math.inf if index == 2 else 1.0))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), step.state_dict()))
    other_model, other_optimizer, other = fresh()
    other_model.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    assert other.scale == step.scale == 2.0**15
    for index in range(6, 10):
        assert torch.equal(step(inputs(index))[0], other(inputs(index))[0])
    assert same(values(model), values(other_model))
    step(inputs(10))
    with pytest.raises(RuntimeError, match="within a cycle would lose 1 of 2 micro-batches"):
        step.state_dict()
    static = TrainStep(model, square_loss, optimizer, loss_scale=8.0)
    with pytest.raises(ValueError, match="must both have a dynamic loss scale"):
        static.load_state_dict(saved[2])


def test_an_error_in_a_cycle_starts_a_new_one():
    model = net()
    step = TrainStep(model, square_loss, adamw(model), grad_accum=2)
    step(inputs(0))
    with pytest.raises(RuntimeError, match="shapes"):
        step(torch.ones(2, 7))
    assert not step(inputs(1))[1].updated
    assert step(inputs(2))[1].updated


HALF = nn.Linear(2, 2).half()
FROZEN = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"precision": "fp8"},
            ValueError,
            "precision must be one of 'fp32', 'tf32', 'bf16', 'fp16', 'auto', got 'fp8'",
        ),
        ({"loss_scale": 0.0}, ValueError, r"loss_scale must be in \(0, inf\), got 0.0"),
        ({"loss_scale": "static"}, ValueError, "loss_scale must be one of 'auto', 'dynamic', got 'static'"),
        ({"compile": "yes"}, ValueError, "compile must be False, True, 'auto' or a dict"),
        ({"compile": {"backnd": "eager"}}, ValueError, "an option in compile must be one of 'backend'"),
        ({"compile": "auto"}, ValueError, "compile='auto' needs total_steps"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"grad_accum": 0}, ValueError, "grad_accum must be at least 1, got 0"),
        ({"grad_accum": 1.5}, TypeError, "grad_accum must be an int"),
        ({"clip_norm": 0}, ValueError, r"clip_norm must be in \(0, inf\), got 0"),
        ({"on_nonfinite": "shrink"}, ValueError, "on_nonfinite must be one of 'skip', 'raise', got 'shrink'"),
        ({"grad_acum": 2}, TypeError, "grad_acum"),
        ({"model": "m"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"loss_fn": 1.0}, TypeError, "loss_fn must be a callable"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"model": FROZEN}, ValueError, "model Linear has no trainable parameters"),
        ({"model": HALF, "precision": "fp16"}, ValueError, "parameters must be float32 .* half ones: weight, bias"),
    ],
)
def test_bad_options(options, error, match):
    model = nn.Linear(2, 2)
    arguments = {"model": model, "loss_fn": square_loss, "optimizer": adamw(model)} | options
    with pytest.raises(error, match=match):
        TrainStep(**arguments)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda model, x: model(x), r"must return a floating scalar tensor, got shape \(5, 3\), torch.float32"),
        (lambda model, x: 1.0, "must return a floating scalar tensor, got float"),
        (lambda model, x: model(x).argmax(), "must return a floating scalar tensor, got shape"),
    ],
)
def test_bad_losses(loss, match):
    model = net()
    with pytest.raises(TypeError, match=match):
        TrainStep(model, loss, adamw(model))(inputs(0))


def test_family_optimizers_run_in_every_precision():
    for make in (Lion, Tiger):
        for precision in ("fp32", "bf16", "fp16"):
            model = net()
            step = TrainStep(model, square_loss, make(parameter_groups(model), lr=0.01), precision=precision)
            losses = [float(step(inputs(0))[0]) for _ in range(10)]
            assert losses[-1] < losses[0]
    assert StepRecord(1.0, True, False, None).updated
