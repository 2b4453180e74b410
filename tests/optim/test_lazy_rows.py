"""Lazy rows of Lion and Tiger: a float64 oracle over every option, the anomaly itself, and hard cases."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from oracles import tiger_scale
from torch import nn

import danlu.optim._row_steps as row_steps
from danlu.optim import Lion, Tiger, parameter_groups, tie_embeddings
from danlu.optim._row_steps import step_rows

both = pytest.mark.parametrize("cls", [Lion, Tiger])
states = pytest.mark.parametrize("lazy_state", ["decay", "freeze"])
# Rows where they lie (compiled), rows gathered in blocks, and masks over the whole table.
paths = pytest.mark.parametrize("foreach", [None, True, False], ids=["in place", "gathered", "masked"])
ROWS, WIDTH = 7, 4


class LazyOracle:
    """A lazy table in NumPy's float64, written from the definition: every row's momentum decays at every cycle."""

    def __init__(self, theta, cls, *, lazy_state="decay", k=1, lr=0.02, weight_decay=0.1, sign=1.0, nonfinite=None):
        self.theta, self.m, self.cls, self.freeze = theta.copy(), np.zeros_like(theta), cls, lazy_state == "freeze"
        self.k, self.lr, self.weight_decay, self.sign = k, lr, weight_decay, sign
        self.nonfinite = nonfinite or ("skip" if cls is Lion else "shrink")
        self.touched, self.seen = np.zeros(len(theta), bool), False

    def cycle(self, grads, marks=None, padding=None):
        for i, g in enumerate(grads):
            self._micro_step(g, i + 1 == len(grads), None if marks is None else marks[i], padding)
        self.touched[:], self.seen = False, False

    def _micro_step(self, g, last, marks, padding):
        if g is None and not (last and self.seen):
            return
        now = np.zeros(len(self.theta), bool)
        if g is not None:
            now = (g != 0).any(-1) if marks is None else marks.copy()
            if padding is not None:
                now[padding] = False
            g = np.where(now[:, None], g, 0.0)
        bad = g is not None and self.nonfinite in ("skip", "shrink") and not np.isfinite(g).all()
        before = self.m.copy()
        fresh = now & ~self.touched
        self.touched |= now
        if self.cls is Lion:
            u = np.sign(0.9 * self.m + 0.1 * g)
            m, scale = 0.99 * self.m + 0.01 * g, 1.0
        else:
            m = self.m.copy()
            if g is not None:
                first = not self.seen
                decayed = fresh if self.freeze else np.full(len(m), first)
                m[decayed] *= 0.9
                if not first:
                    # A bad gradient loses the decay of a cycle that it begins, not of a row that it comes to later.
                    before = m.copy()
                m = m + 0.1 / self.k * g
            u, scale = np.sign(m), tiger_scale(self.theta, "embedding")
        self.seen = self.seen or g is not None
        moved = self.theta - self.lr * scale * (self.sign * u + self.weight_decay * self.theta)
        if bad:
            m, moved = before, self.theta * (0.99 if self.nonfinite == "shrink" else 1.0)
        if last or bad:
            # Before the last micro-step a bad gradient shrinks the rows that it touches itself.
            reached = self.touched if last else now
            self.theta = np.where(reached[:, None], moved, self.theta)
        self.m = np.where(now[:, None], m, before) if self.freeze else m


def gradients(steps, *, k=1, seed=0, every=False, rows=ROWS, width=WIDTH):
    """Cycles of micro-gradients in which about a third of the rows are not all zero, and sometimes none or one."""
    random = np.random.default_rng(seed)
    for step in range(steps):
        cycle = []
        for _ in range(k):
            keep = random.random(rows) < (1.0 if every else [0.35, 0.0, 0.1, 0.6][step % 4])
            cycle.append(random.normal(size=(rows, width)) * keep[:, None])
        yield cycle


def distinct(g):
    """The same gradient by coordinates: unsorted, no row twice, and not known to be so."""
    table = torch.as_tensor(g)
    rows = (table != 0).any(-1).nonzero()[:, 0].flip(0)
    return torch.sparse_coo_tensor(rows[None], table[rows], table.shape, check_invariants=True)


def sparse(g):
    """The same gradient by coordinates: unsorted, and one row in two parts."""
    table = torch.as_tensor(g)
    rows = (table != 0).any(-1).nonzero()[:, 0].flip(0)
    values = table[rows]
    if len(rows):
        rows, values = torch.cat([rows, rows[:1]]), torch.cat([values, values[:1] * 0.5])
        values[0] *= 0.5
    return torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=True)


def make(cls, params, **options):
    if cls is Tiger:
        options = {"beta": 0.9, "weight_decay": 0.1, "lr": 0.02} | options
    else:
        options = {"weight_decay": 0.1, "lr": 0.02} | options
    return cls([{"params": [("table", p)], "kind": "embedding"} for p in params], lazy=("embedding",), **options)


def momentum(optimizer, p):
    """What the momentum is once all deferred decay is applied."""
    state = dict(optimizer.state[p])
    state["exp_avg"] = state["exp_avg"].clone()
    group = optimizer.param_groups[0]
    row_steps.settle(state, group["betas"][1] if "betas" in group else group["beta"])
    return state["exp_avg"]


def step_on(optimizer, p, g, as_sparse=False):
    p.grad = None if g is None else (sparse(g) if as_sparse else torch.as_tensor(g)).to(p.dtype)
    optimizer.step()


@both
@states
@paths
@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"nonfinite": "off"}], ids=str)
def test_oracle(cls, lazy_state, foreach, as_sparse, options, monkeypatch):
    monkeypatch.setattr(row_steps, "BLOCK", 2 * WIDTH)  # several blocks of rows
    start = np.random.default_rng(9).normal(size=(ROWS, WIDTH))
    p = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = make(cls, [p], lazy_state=lazy_state, foreach=foreach, **options)
    sign = -1.0 if options.get("maximize") else 1.0
    # Lion's momentum averages the gradients as they come, also under `maximize`.
    oracle = LazyOracle(start, cls, lazy_state=lazy_state, sign=sign)
    for (g,) in gradients(40):
        step_on(optimizer, p, g, as_sparse)
        oracle.cycle([g])
        torch.testing.assert_close(p.detach(), torch.from_numpy(oracle.theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(momentum(optimizer, p), torch.from_numpy(oracle.m), rtol=1e-12, atol=1e-15)


@states
@paths
@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_oracle_with_accumulation(lazy_state, foreach, as_sparse, k, monkeypatch):
    """A row counts if any micro-step of the cycle touched it; None is a micro-step without a gradient."""
    monkeypatch.setattr(row_steps, "BLOCK", 2 * WIDTH)
    start = np.random.default_rng(9).normal(size=(ROWS, WIDTH))
    p = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = make(Tiger, [p], lazy_state=lazy_state, foreach=foreach, grad_accum_steps=k)
    oracle = LazyOracle(start, Tiger, lazy_state=lazy_state, k=k)
    for step, cycle in enumerate(gradients(30, k=k)):
        if step % 5 == 2:
            cycle[step % k] = None
        if step == 11:
            cycle = [None] * k
        for g in cycle:
            step_on(optimizer, p, g, as_sparse)
        oracle.cycle(cycle)
        assert "touched" not in optimizer.state[p]
        torch.testing.assert_close(p.detach(), torch.from_numpy(oracle.theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(momentum(optimizer, p), torch.from_numpy(oracle.m), rtol=1e-12, atol=1e-15)


@both
@states
@paths
@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradients(cls, lazy_state, foreach, as_sparse, bad):
    """A bad gradient costs the touched rows this update and the momentum of all rows this decay; others stay put."""
    start = np.random.default_rng(9).normal(size=(ROWS, WIDTH))
    p = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = make(cls, [p], lazy_state=lazy_state, foreach=foreach)
    oracle = LazyOracle(start, cls, lazy_state=lazy_state)
    events = 0
    for step, (g,) in enumerate(gradients(40)):
        if step % 7 == 3 and g.any():
            row = int(g.any(-1).argmax())
            g[row, 1], events = bad, events + 1
        step_on(optimizer, p, g, as_sparse)
        oracle.cycle([g])
        torch.testing.assert_close(p.detach(), torch.from_numpy(oracle.theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(momentum(optimizer, p), torch.from_numpy(oracle.m), rtol=1e-12, atol=1e-15)
    assert optimizer.nonfinite_events == {"table": events}
    assert events >= 3


@states
@paths
@pytest.mark.parametrize("when", [0, 1, 2])
def test_bad_gradients_within_a_cycle(lazy_state, foreach, when):
    start = np.random.default_rng(9).normal(size=(ROWS, WIDTH))
    p = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = make(Tiger, [p], lazy_state=lazy_state, foreach=foreach, grad_accum_steps=3)
    oracle = LazyOracle(start, Tiger, lazy_state=lazy_state, k=3)
    for step, cycle in enumerate(gradients(12, k=3)):
        if step % 3 == 0:
            cycle[when][2, 1] = math.nan
            cycle[(when + 1) % 3] = None
        for g in cycle:
            step_on(optimizer, p, g)
        oracle.cycle(cycle)
        torch.testing.assert_close(p.detach(), torch.from_numpy(oracle.theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(momentum(optimizer, p), torch.from_numpy(oracle.m), rtol=1e-12, atol=1e-15)
    assert optimizer.nonfinite_events == {"table": 4}


@both
@states
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "kahan"),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 3])
def test_lazy_is_dense_when_every_row_has_a_gradient(cls, lazy_state, dtype, rounding, k):
    found = []
    for lazy in (True, False):
        p = nn.Parameter(torch.linspace(-1, 2, ROWS * WIDTH).view(ROWS, WIDTH).to(dtype))
        options = {"grad_accum_steps": k} if cls is Tiger else {}
        options |= {"lazy_state": lazy_state, "rounding": rounding}
        optimizer = cls([{"params": [p], "kind": "embedding", "lazy": lazy}], **options)
        for cycle in gradients(12, k=k, every=True):
            for g in cycle:
                step_on(optimizer, p, g)
        found.append((p.detach(), momentum(optimizer, p)))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@both
def test_tied_tables_are_dense(cls):
    """The softmax gives every row of a tied table a gradient, so the lazy mask is all ones."""
    found = []
    for lazy in ((), ("embedding",)):
        torch.manual_seed(0)
        model = tie_embeddings(nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 9)))
        optimizer = cls(parameter_groups(model), lr=0.01, lazy=lazy)
        for step in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.tensor([step, 1])), torch.tensor([2, step])).backward()
            assert (model[0].weight.grad != 0).any(-1).all()
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def one_token_once(optimizer_of, steps):
    """A 2x8 table whose row 0 has a gradient at the first step only, and row 1 at every step."""
    p = nn.Parameter(torch.full((2, 8), 0.02))
    optimizer = optimizer_of(p)
    for step in range(steps):
        p.grad = torch.zeros(2, 8)
        p.grad[1] = (-1.0) ** step
        if step == 0:
            p.grad[0] = torch.tensor([1.0, -1.0] * 4)
        optimizer.step()
        if step == 0:
            once = p.detach()[0].clone()
    return p.detach()[0], once


def test_a_token_seen_once_runs_to_the_bound_and_lazily_stays():
    def tiger(p, **options):
        return Tiger([{"params": [p], "kind": "embedding"}], lr=5e-3, weight_decay=0.1, **options)

    row, _ = one_token_once(tiger, 4000)
    assert row.abs().max() == pytest.approx(9.9999, abs=2e-4)
    for lazy_state in ("decay", "freeze"):
        row, once = one_token_once(lambda p, mode=lazy_state: tiger(p, lazy=("embedding",), lazy_state=mode), 400)
        assert torch.equal(row, once)
        assert not torch.equal(row, torch.full((8,), 0.02))


def test_logistic_curve_of_tiger():
    r"""$|\theta|(t) = \lambda^{-1} / (1 + (1/(\lambda|\theta_0|) - 1) e^{-\alpha t})$; half the bound at 8517 steps."""
    start, lr, weight_decay = 0.02, 1e-3, 0.01
    half = math.log(1 / (weight_decay * start) - 1) / lr
    assert round(half) == 8517
    p = nn.Parameter(torch.full((1, 2), start, dtype=torch.float64))
    optimizer = Tiger([{"params": [p], "kind": "embedding"}], lr=lr, weight_decay=weight_decay)
    for step in range(1, 8518):
        p.grad = torch.full_like(p, -1.0 if step == 1 else 0.0)
        optimizer.step()
        if step in (2000, 5000, 8517):
            curve = (1 / weight_decay) / (1 + (1 / (weight_decay * start) - 1) * math.exp(-lr * step))
            assert p[0, 0].item() == pytest.approx(curve, rel=5e-3)
    assert p[0, 0].item() == pytest.approx(49.911, abs=1e-3)


@pytest.mark.parametrize(
    ("dtype", "beta", "steps", "units"),
    [
        (torch.float32, 0.965, 2563, 14),
        (torch.float32, 0.98, None, 25),
        (torch.float32, 0.99, None, 50),
        (torch.float16, 0.965, 131, 14),
        (torch.bfloat16, 0.965, 2257, 14),
    ],
    ids=str,
)
def test_momentum_never_rounds_to_zero(dtype, beta, steps, units):
    r"""$\beta m$ rounds back to $m$ once $m \le \lfloor 0.5/(1-\beta) \rfloor$ units of the smallest subnormal."""
    smallest = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}[dtype]
    assert math.floor(0.5 / (1 - beta) + 1e-9) == units
    m, factor = torch.tensor(1e-4, dtype=dtype), torch.tensor(beta)
    done, flushed = 0, None
    while True:
        after = (m.double() * factor.double()).to(dtype) if dtype == torch.float32 else (m.float() * factor).to(dtype)
        if torch.equal(after, m):
            break
        m, done = after, done + 1
        flushed = done if flushed is None and m < torch.finfo(dtype).tiny else flushed
    assert m.item() / smallest == units
    if steps is not None:
        assert done + 1 == steps  # the first multiplication that changes nothing
    if dtype == torch.float32 and beta == 0.965:
        assert flushed == 2193


@both
@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"foreach": False}, {"lazy": False}, {"lazy": False, "foreach": False}], ids=str
)
@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_padding_row_never_moves(cls, as_sparse, options, bad):
    """Not by its gradient (a tied head gives it one), nor by decay, the rescue, or a mark."""
    options = dict(options)
    start = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    group = {"params": [p], "kind": "embedding", "padding_idx": 2, "lazy": options.pop("lazy", True)}
    optimizer = cls([group], lr=0.1, weight_decay=0.3, **options)
    for step, (g,) in enumerate(gradients(8, every=True)):
        g[4, 0] += bad if step % 2 else 0.0
        if group["lazy"] and step == 5:
            optimizer.mark_rows(p, torch.tensor([1, 2]))
        step_on(optimizer, p, g, as_sparse)
    assert torch.equal(p.detach()[2], start[2])
    assert (p.detach() != start).any(-1).sum() == ROWS - 1


def test_padding_is_recorded_for_models():
    for tied in (True, False):
        model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 9))
        if tied:
            tie_embeddings(model)
        with torch.no_grad():
            model[0].weight[0] = 3.0
        optimizer = Tiger(model, lr=0.1, weight_decay=0.5, lazy=("embedding",))
        for step in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.tensor([0, step])), torch.tensor([0, 1])).backward()
            optimizer.step()
        assert torch.equal(model[0].weight[0], torch.full((4,), 3.0))


@both
@states
@pytest.mark.parametrize("foreach", [None, False])
def test_no_rows_and_no_gradients(cls, lazy_state, foreach):
    for shape in ((0, 4), (3, 0)):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = make(cls, [p], lazy_state=lazy_state, foreach=foreach)
        for g in (
            torch.zeros(shape),
            torch.sparse_coo_tensor(torch.zeros(1, 0).long(), torch.zeros(0, shape[1]), shape, check_invariants=True),
        ):
            p.grad = g
            optimizer.step()
        assert p.shape == shape
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = make(cls, [p], lazy_state=lazy_state, foreach=foreach)
    step_on(optimizer, p, torch.ones(3, 2).numpy())
    moved = p.detach().clone()
    for _ in range(3):
        step_on(optimizer, p, torch.zeros(3, 2).numpy())
    assert torch.equal(p.detach(), moved)
    beta = 0.99 if cls is Lion else 0.9
    expected = (1 - beta) * (beta**3 if lazy_state == "decay" else 1.0)
    torch.testing.assert_close(momentum(optimizer, p), torch.full((3, 2), expected))


@both
def test_vectors_and_tables_with_more_axes(cls):
    for shape in ((5,), (5, 2, 3)):
        found = []
        for foreach in (None, False):
            p = nn.Parameter(torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape))
            kind = "vector" if len(shape) == 1 else "embedding"
            optimizer = cls([{"params": [p], "kind": kind, "lazy": True}], lr=0.1, foreach=foreach)
            for step in range(6):
                p.grad = torch.zeros(shape, dtype=torch.float64)
                p.grad[step % 3] = 1.0 + step
                optimizer.step()
            assert torch.equal(
                p.detach()[3:], torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)[3:]
            )
            found.append(p.detach())
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_rows_of_a_matrix_keep_the_scale_of_the_matrix():
    """Experts stacked in one tensor: the RMS is that of the whole tensor, also for a step of some of its rows."""
    start = torch.randn(6, 4, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    optimizer = Tiger([{"params": [p], "kind": "matrix", "lazy": True}], lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros_like(start)
    p.grad[1] = 2.0
    optimizer.step()
    expected = start.clone()
    expected[1] -= 0.1 * start.square().mean().sqrt()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_complex_rows():
    p = nn.Parameter(torch.ones(3, 2, dtype=torch.complex128))
    optimizer = Lion([{"params": [p], "lazy": True}], lr=0.5)
    p.grad = torch.zeros_like(p)
    p.grad[1] = 3j
    optimizer.step()
    expected = torch.ones(3, 2, dtype=torch.complex128)
    expected[1] -= 0.5j
    torch.testing.assert_close(p.detach(), expected)


@both
@states
@pytest.mark.parametrize("as_sparse", [False, True])
@paths
def test_marked_rows(cls, lazy_state, as_sparse, foreach):
    """Marks take the place of the search: other rows stay, marked rows without a gradient move by their momentum."""
    start = np.random.default_rng(9).normal(size=(ROWS, WIDTH))
    p = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = make(cls, [p], lazy_state=lazy_state, foreach=foreach)
    oracle = LazyOracle(start, cls, lazy_state=lazy_state)
    random = np.random.default_rng(1)
    for step, (g,) in enumerate(gradients(20)):
        marks = None
        if step % 2:
            ids = random.integers(ROWS, size=(2, 2))
            marks = np.zeros(ROWS, bool)
            marks[ids.flatten()] = True
            for part in ids:
                optimizer.mark_rows(p, torch.from_numpy(part[None]))
        step_on(optimizer, p, g, as_sparse)
        oracle.cycle([g], None if marks is None else [marks])
        torch.testing.assert_close(p.detach(), torch.from_numpy(oracle.theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(momentum(optimizer, p), torch.from_numpy(oracle.m), rtol=1e-12, atol=1e-15)


@both
@states
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact_within_a_cycle(cls, lazy_state, dtype):
    def fresh():
        return nn.Parameter(torch.linspace(-1, 2, ROWS * WIDTH).view(ROWS, WIDTH).to(dtype))

    options = {"grad_accum_steps": 3} if cls is Tiger else {}
    p = fresh()
    optimizer = make(cls, [p], lazy_state=lazy_state, **options)
    cycles = [g for cycle in gradients(8, k=3) for g in cycle]
    for g in cycles[:11]:
        step_on(optimizer, p, g)
    buffer = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    q = nn.Parameter(saved["p"].clone())
    resumed = make(cls, [q], lazy_state=lazy_state, lr=0.7, **options)
    resumed.load_state_dict(saved["optimizer"])
    for key, value in optimizer.state[p].items():
        loaded = resumed.state[q][key]
        assert loaded == value if not isinstance(value, torch.Tensor) else torch.equal(loaded, value), key
        if isinstance(value, torch.Tensor):
            assert loaded.dtype == value.dtype
            assert loaded.data_ptr() != saved["optimizer"]["state"][0][key].data_ptr()
    r, twin = copy.deepcopy((p, optimizer))
    for g in cycles[11:]:
        step_on(optimizer, p, g)
        step_on(resumed, q, g)
        step_on(twin, r, g)
    assert torch.equal(p, q)
    assert torch.equal(p, r)


@both
def test_turning_lazy_off_applies_the_deferred_decay(cls):
    """From then on the run equals one whose momentum had decayed at every step."""
    start = np.random.default_rng(9).normal(size=(ROWS, WIDTH))
    p = nn.Parameter(torch.from_numpy(start.copy()))
    q = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer, eager = make(cls, [p]), make(cls, [q], foreach=False)
    for step, (g,) in enumerate(gradients(20)):
        for one in (optimizer, eager):
            one.param_groups[0]["lazy"] = step < 10
        step_on(optimizer, p, g)
        step_on(eager, q, g)
    assert "last_step" not in optimizer.state[p]
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


@both
@states
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {}),
        (torch.bfloat16, {"rounding": "nearest", "state_dtype": torch.float32}),
        (torch.bfloat16, {"rounding": "kahan", "state_dtype": torch.float32}),
        (torch.bfloat16, {"rounding": "stochastic"}),
        (torch.float16, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("gradient", [torch.as_tensor, sparse, distinct])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_rows_equal_gathered_ones(cls, lazy_state, dtype, options, gradient, threads):
    """Whatever the form of the gradient, with one thread and with several."""
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for foreach in (None, True):
            p = nn.Parameter(torch.linspace(-1, 2, 40 * 33).view(40, 33).to(dtype))
            optimizer = make(cls, [p], lazy_state=lazy_state, foreach=foreach, **options)
            for (g,) in gradients(12, rows=40, width=33):
                p.grad = gradient(g).to(dtype)
                optimizer.step()
            compensation = optimizer.state[p].get("compensation", torch.zeros(()))
            found.append((p.detach().double() + compensation.double(), momentum(optimizer, p).double()))
    finally:
        torch.set_num_threads(before)
    spacing = torch.finfo(dtype).eps
    if options.get("rounding") == "kahan":
        spacing *= 2**-7
    for first, second in zip(*found, strict=True):
        assert (first - second).abs().max() <= 4 * spacing
    assert not torch.equal(found[0][0], torch.linspace(-1, 2, 40 * 33).view(40, 33).double())


@pytest.mark.parametrize("lazy_state", ["decay", "freeze"])
@paths
def test_a_sparse_gradient_of_every_row_in_any_order(lazy_state, foreach):
    """At the end of a cycle whose beginning touched some rows."""
    found = []
    for gradient in (torch.as_tensor, distinct):
        p = nn.Parameter(torch.linspace(-1, 2, ROWS * WIDTH, dtype=torch.float64).view(ROWS, WIDTH))
        optimizer = make(Tiger, [p], lazy_state=lazy_state, foreach=foreach, grad_accum_steps=2)
        for step in range(3):
            (some,), (every,) = next(gradients(1, seed=step)), next(gradients(1, seed=step, every=True))
            for g in (some, every):
                p.grad = gradient(g)
                optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_one_row_without_axes_has_the_scale_of_the_vector():
    start = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    for foreach in (None, True, False):
        p = nn.Parameter(start.clone())
        options = {"lr": 0.1, "weight_decay": 0.0, "foreach": foreach}
        optimizer = Tiger([{"params": [p], "kind": "embedding", "lazy": True}], **options)
        p.grad = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        optimizer.step()
        expected = torch.tensor([3.0, -4.0 - 0.1 * (25 / 3) ** 0.5, 0.0], dtype=torch.float64)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_lazy_rows_of_half_precision_are_those_of_the_dense_step():
    """One step from one state: touched rows get bit for bit what the dense step gives them."""
    for dtype in (torch.bfloat16, torch.float16):
        found = []
        for lazy in (True, False):
            p = nn.Parameter(torch.linspace(-1, 2, ROWS * WIDTH).view(ROWS, WIDTH).to(dtype))
            optimizer = Tiger([{"params": [p], "kind": "embedding", "lazy": lazy}], lr=0.1, rounding="nearest")
            (g,) = next(gradients(1))
            step_on(optimizer, p, g)
            found.append(p.detach()[(g != 0).any(-1)])
        assert torch.equal(*found)


def test_sparse_gradient_without_lazy_equals_the_dense_one():
    for cls in (Lion, Tiger):
        found = []
        for as_sparse in (True, False):
            p = nn.Parameter(torch.linspace(-1, 2, ROWS * WIDTH, dtype=torch.float64).view(ROWS, WIDTH))
            optimizer = cls([{"params": [p], "kind": "embedding"}], lr=0.1, weight_decay=0.1)
            for (g,) in gradients(20):
                step_on(optimizer, p, g, as_sparse)
            found.append((p.detach(), momentum(optimizer, p)))
        for first, second in zip(*found, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_sparse_embedding_end_to_end():
    found = []
    for is_sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 4, sparse=is_sparse, padding_idx=0), nn.Linear(4, 2))
        optimizer = Tiger(model, lr=0.05, lazy=("embedding",), grad_accum_steps=2, nonfinite="raise")
        for step in range(8):
            tokens = torch.randint(30, (5,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(tokens).square().sum().backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_sparse_gradient_that_is_bad_is_named():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = make(Lion, [p], nonfinite="raise")
    p.grad = sparse(np.array([[math.nan, 1.0], [0.0, 0.0], [1.0, 1.0]])).float()
    with pytest.raises(RuntimeError, match=r"nothing was changed.*parameters: table"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 2))


def test_rows_whose_squares_vanish_or_overflow_are_seen():
    for size in (1e-30, 1e30):
        p = nn.Parameter(torch.ones(3, 2))
        optimizer = make(Lion, [p], weight_decay=0.0, lr=0.5)
        p.grad = torch.zeros(3, 2)
        p.grad[1] = -size
        optimizer.step()
        assert torch.equal(p.detach(), torch.tensor([[1.0, 1.0], [1.5, 1.5], [1.0, 1.0]]))
        assert optimizer.nonfinite_events == {}


@both
@pytest.mark.parametrize(
    ("group", "error", "match"),
    [
        ({"lazy": "embedding"}, TypeError, r"lazy must be a bool or a sequence of kinds such as \('embedding',\)"),
        ({"lazy": 1}, TypeError, "lazy must be a bool or a sequence of kinds"),
        ({"lazy": ("embeddings",)}, ValueError, "lazy must be one of 'embedding'.*got 'embeddings'"),
        ({"lazy": True, "lazy_state": "keep"}, ValueError, "lazy_state must be one of 'decay', 'freeze', got 'keep'"),
        ({"sign_deadzone": -1.0}, ValueError, r"sign_deadzone must be in \[0, 1\), got -1.0"),
        ({"sign_deadzone": 1.0}, ValueError, r"sign_deadzone must be in \[0, 1\), got 1.0"),
        ({"padding_idx": -1}, ValueError, "padding_idx must be at least 0, got -1"),
        ({"padding_idx": 0.5}, TypeError, "padding_idx must be an int"),
        ({"padding_idx": 3}, ValueError, r"padding_idx=3 is not a row of a parameter of shape \(3, 2\)"),
    ],
    ids=str,
)
def test_bad_options(cls, group, error, match):
    p = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(error, match=match):
        cls([{"params": [p], "kind": "embedding", **group}])
    optimizer = cls([{"params": [nn.Parameter(torch.ones(1))], "kind": "vector"}])
    with pytest.raises(error, match=match):
        optimizer.add_param_group({"params": [p], "kind": "embedding", **group})
    assert len(optimizer.param_groups) == 1


@both
def test_bad_marks_and_scalars(cls):
    p, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = make(cls, [p])
    optimizer.add_param_group({"params": [("other", other)], "kind": "matrix"})
    for token_ids, error, match in (
        (torch.tensor([3]), ValueError, r"token_ids must be in \[0, 3\), got a value 3"),
        (torch.tensor([-100, 1]), ValueError, r"token_ids must be in \[0, 3\), got a value -100"),
        (torch.tensor([0.0]), TypeError, "token_ids must be a tensor of integers, got torch.float32"),
        (torch.tensor([True]), TypeError, "token_ids must be a tensor of integers, got torch.bool"),
        ([0], TypeError, "token_ids must be a tensor of integers, got list"),
    ):
        with pytest.raises(error, match=match):
            optimizer.mark_rows(p, token_ids)
    with pytest.raises(ValueError, match="is in a group that is not lazy"):
        optimizer.mark_rows(other, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"of shape \(4,\) is not a parameter of this optimizer"):
        optimizer.mark_rows(torch.ones(4), torch.tensor([0]))
    optimizer.mark_rows(p, torch.tensor([], dtype=torch.int64))
    step_on(optimizer, p, np.ones((3, 2)))
    assert torch.equal(p.detach(), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"lazy needs parameters with rows, got one of shape \(\)"):
        optimizer.add_param_group({"params": [("s", nn.Parameter(torch.ones(())))], "kind": "vector", "lazy": True})


@both
def test_an_option_without_effect_is_said(cls):
    p = nn.Parameter(torch.ones(3, 2))
    with pytest.warns(UserWarning, match=r"lazy=\('embedding',\) has no effect.*parameter_groups"):
        cls([{"params": [p], "kind": "matrix"}], lazy=("embedding",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([{"params": [p], "kind": "embedding"}], lazy=("embedding",))


def test_eager_form_is_the_way_of_tensor_subclasses():
    """No index by row, no read of a value: what DTensors need. Here with a subclass that forbids gathering."""

    class Rows(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert "index" not in getattr(func, "__name__", ""), func
            return super().__torch_function__(func, types, args, kwargs or {})

    def update(param, grad, state, folded, guard, part):
        state["exp_avg"].lerp_(grad, 0.5)
        param.sub_(state["exp_avg"].sign())

    p = torch.ones(3, 2).as_subclass(Rows)
    g = torch.zeros(3, 2)
    g[1] = 1.0
    state = {"exp_avg": torch.zeros(3, 2)}
    step_rows(p, g, state, update, beta=0.5)
    assert torch.equal(p.as_subclass(torch.Tensor), torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))
