"""Run by test_linear_rows.py with Triton's interpreter, on CPU tensors; prints JSON: check -> result."""

import json
import math
import traceback

import torch

from danlu.kernels.linear_rows import RowCoefficients, row_statistics, write_row_gradients

SHAPES = [(1, 1), (3, 2), (5, 77), (4, 4096), (2, 4097), (7, 9001)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def problem(rows, classes, dtype):
    torch.manual_seed(rows + classes)
    logits = (3 * torch.randn(rows, classes)).to(dtype)
    return logits, torch.randint(classes, (rows,)), torch.rand(rows, classes).to(dtype)


def reference(logits, target, weights, *, smoothing=0.1, cost_weight=0.0, costs=None, softcap=None):
    """Cross entropy with smoothing plus the expected cost, by autograd in float64."""
    leaf = logits.double().clone().requires_grad_()
    z = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    log_p = z.log_softmax(1)
    nll = -log_p.gather(1, target[:, None])[:, 0]
    loss = (1 - smoothing) * nll + smoothing * -log_p.mean(1)
    expected = torch.zeros_like(nll)
    if costs is not None:
        free = costs.double().scatter(1, target[:, None], 0.0)
        expected = (log_p.exp() * free).sum(1)
        loss = loss + cost_weight * expected
    (loss * weights).sum().backward()
    return z.detach(), nll.detach(), expected.detach(), leaf.grad


def compare(dtype, *, costs=False, softcap=None):
    for rows, classes in SHAPES:
        logits, target, prices = problem(rows, classes, dtype)
        weights = torch.rand(rows, dtype=torch.float64)
        weights[0] = 0
        keep = weights > 0
        prices = prices if costs else None
        z, nll, expected, gradient = reference(logits, target, weights, cost_weight=0.7, costs=prices, softcap=softcap)
        found = row_statistics(logits, target, costs=prices, softcap=softcap)
        tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close((found.log_total - found.chosen).double(), nll, **tolerance)
        torch.testing.assert_close(found.expected.double(), expected, **tolerance)
        torch.testing.assert_close(found.sums.double() / classes, z.mean(1), **tolerance)
        assert torch.equal(found.best, z.argmax(1)) or softcap is not None
        weights = weights.to(found.log_total.dtype)
        coefficients = RowCoefficients(weights, 0.9 * weights, 0.1 / classes * weights, 0.7 * weights)
        logits[0] = math.nan
        assert write_row_gradients(logits, target, keep, found, coefficients, costs=prices, softcap=softcap) is logits
        torch.testing.assert_close(logits.double(), gradient, **tolerance)


def check_float64():
    compare(torch.float64)


def check_float32():
    compare(torch.float32)


def check_bfloat16():
    compare(torch.bfloat16)


def check_float16():
    compare(torch.float16)


def check_costs():
    compare(torch.float64, costs=True)
    compare(torch.float32, costs=True)


def check_softcap():
    compare(torch.float64, softcap=2.0)
    compare(torch.float32, costs=True, softcap=30.0)


def check_small_logits_under_a_cap():
    logits = torch.full((1, 5), 1e-9, dtype=torch.float64) * torch.arange(5)
    found = row_statistics(logits, torch.tensor([4]), softcap=50.0)
    torch.testing.assert_close(found.chosen, logits[:, 4], rtol=1e-14, atol=0)


def check_masked_classes_and_rows():
    logits = torch.randn(4, 9000, dtype=torch.float64)
    logits[0, 1:] = -math.inf
    logits[1, :5000] = -math.inf
    logits[2] = -math.inf
    logits[3, 7] = math.nan
    target = torch.tensor([0, 6000, 3, 4])
    found = row_statistics(logits, target)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(found.log_total - found.chosen, expected, equal_nan=True)
    ones = torch.ones(4, dtype=torch.float64)
    zeros = torch.zeros_like(ones)
    write_row_gradients(logits, target, ones.bool(), found, RowCoefficients(ones, ones, zeros, zeros))
    assert logits[0].abs().max() < 1e-15
    assert torch.equal(logits[1, :5000], torch.zeros(5000, dtype=torch.float64))
    assert logits[2].isnan().all()
    assert logits[3].isnan().all()


def check_another_dtype_and_strides():
    wide = torch.randn(3, 2, 100)
    logits, target = wide[:, 0], torch.tensor([1, 2, 99])
    assert logits.stride(0) == 200
    found = row_statistics(logits, target)
    ones, zeros = torch.ones(3), torch.zeros(3)
    out = torch.empty(3, 100, dtype=torch.bfloat16)
    kept = wide.clone()
    write_row_gradients(logits, target, ones.bool(), found, RowCoefficients(ones, ones, zeros, zeros), out=out)
    assert torch.equal(wide, kept)
    torch.testing.assert_close(
        out.float(), reference(logits, target, ones, smoothing=0)[3].float(), rtol=1e-2, atol=1e-2
    )


def check_no_rows():
    logits, target = torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)
    found = row_statistics(logits, target)
    none = torch.zeros(0)
    assert found.log_total.shape == (0,)
    write_row_gradients(logits, target, none.bool(), found, RowCoefficients(none, none, none, none))


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def main():
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()[-2000:]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
