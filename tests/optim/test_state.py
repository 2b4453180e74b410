"""What moves, shrinks or is replaced between two steps is seen: calls prepared on addresses equal the plain steps."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from danlu import kernels
from danlu.optim import Lion, Tiger

pytestmark = [
    pytest.mark.filterwarnings("ignore:Tiger got parameters"),
    pytest.mark.filterwarnings("ignore:the RMS of these"),
]
BOTH = pytest.mark.parametrize("optimizer_class", [Lion, Tiger])


def run(optimizer_class, change, fused, shape=(4, 5), dtype=torch.float32, steps=5, **options):
    """Steps with random gradients; `change(step, param, optimizer)` comes after the gradient is there."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = optimizer_class([param], lr=0.1, fused=fused, **options)
    for step in range(steps):
        param.grad = torch.randn(param.shape).to(dtype)
        change(step, param, optimizer)
        optimizer.step()
    return param.detach().clone()


def paths_agree(optimizer_class, change, tolerance=1e-6, **options):
    results = [run(optimizer_class, change, fused, **options) for fused in (None, False)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=tolerance)


@BOTH
def test_a_cleared_state_starts_anew(optimizer_class):
    def change(step, param, optimizer):
        if step == 3:
            optimizer.state.clear()

    paths_agree(optimizer_class, change)


@BOTH
def test_an_entry_of_the_user_does_not_stand_for_a_state(optimizer_class):
    paths_agree(optimizer_class, lambda step, param, optimizer: optimizer.state[param].update(mine=step))


@BOTH
def test_a_replaced_compensation_is_used(optimizer_class):
    def change(step, param, optimizer):
        if step == 3:
            optimizer.state[param]["compensation"] = torch.full_like(param.detach(), 2.0**-3)

    paths_agree(optimizer_class, change, tolerance=0.0, dtype=torch.bfloat16, rounding="kahan")
    untouched = run(optimizer_class, lambda *_: None, None, dtype=torch.bfloat16, rounding="kahan")
    assert not torch.equal(run(optimizer_class, change, None, dtype=torch.bfloat16, rounding="kahan"), untouched)


@BOTH
def test_a_parameter_cut_in_place_leaves_the_rest_of_its_memory_alone(optimizer_class):
    param = nn.Parameter(torch.ones(8))
    optimizer = optimizer_class([param], lr=0.1)
    for _ in range(2):
        param.grad = torch.ones(8)
        optimizer.step()
    whole, before = param.data, param.data.clone()
    param.grad = None
    param.data = whole[:3]
    momentum = optimizer.state[param]["exp_avg"]
    momentum.set_(momentum[:3])
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(whole[3:], before[3:])
    assert (whole[:3] < before[:3]).all()


@BOTH
def test_a_lazily_negated_gradient_is_read_as_what_it_is(optimizer_class):
    def change(step, param, optimizer):
        if step in (0, 3):
            param.grad = torch._neg_view(param.grad)

    paths_agree(optimizer_class, change)


@BOTH
def test_a_transposition_in_place_is_seen(optimizer_class):
    def change(step, param, optimizer):
        if step == 3:
            param.grad = None
            param.data = param.data.t()
            param.grad = torch.arange(16.0).view(4, 4) - 7

    paths_agree(optimizer_class, change, shape=(4, 4))


@pytest.mark.skipif(kernels.explain("sign_update", torch.ones(1)) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["Lion", "Tiger"])
def test_a_missing_gradient_beside_a_channels_last_parameter(name):
    # In a process of its own: the failure is an access to address 0.
    script = f"""
        import warnings
        import torch
        from torch import nn
        from danlu.optim import {name} as optimizer_class

        warnings.simplefilter("ignore")
        results = []
        for fused in (None, False):
            torch.manual_seed(0)
            image = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
            vector = nn.Parameter(torch.randn(3))
            optimizer = optimizer_class([image, vector], lr=0.1, fused=fused)
            for step in range(4):
                image.grad, vector.grad = torch.randn_like(image), None if step == 2 else torch.randn(3)
                optimizer.step()
            results.append((image.detach(), vector.detach()))
        for one, other in zip(*results):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_changed_kind_is_seen():
    def change(step, param, optimizer):
        optimizer.param_groups[0]["kind"] = "embedding" if step >= 3 else "matrix"

    paths_agree(Tiger, change)


@pytest.mark.parametrize("shape", [(5, 4), (5, 1)])
def test_the_rows_of_an_embedding_are_not_those_of_its_memory(shape):
    def start(fused):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(shape[1], shape[0]).t())
        optimizer = Tiger([{"params": [param], "kind": "embedding"}], lr=0.1, fused=fused)
        for _ in range(3):
            param.grad = torch.randn(shape[1], shape[0]).t()
            optimizer.step()
        return param.detach()

    torch.testing.assert_close(start(None), start(False), rtol=0, atol=1e-6)


@pytest.mark.skipif(kernels.explain("sign_update", torch.ones(1)) is not None, reason="no C++ compiler")
def test_the_compiled_step_refuses_rows_that_are_not_contiguous():
    param = nn.Parameter(torch.ones(4, 5).t())
    param.grad = torch.ones(4, 5).t()
    optimizer = Tiger([{"params": [param], "kind": "embedding"}], lr=0.1, fused=True)
    with pytest.raises(RuntimeError, match="rows are not contiguous"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(5, 4))
