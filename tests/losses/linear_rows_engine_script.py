"""Run with TRITON_INTERPRET=1: the chunked head with the Triton passes, against that with operations of PyTorch.

Prints JSON, case -> what was found.
"""

import itertools
import json
import traceback

import torch

from danlu.losses import EMO, CrossEntropy, GeneralizedCE, TaiLr, _linear_engine, linear_loss

PLAIN = _linear_engine._has_kernel
LOSSES = {
    "cross_entropy": CrossEntropy(0.2),
    "tailr": TaiLr(0.3, min_weight=0.2),
    "generalized": GeneralizedCE(0.6),
    "emo": EMO(cost_embedding="head", max_ratio=3.0, label_smoothing=0.1),
    "emo_copy": EMO(cost_embedding=torch.randn(67, 4, generator=torch.Generator().manual_seed(2)), mode="pure"),
}
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5},
    "margin": {"target_shift": 0.5, "reduction": "none"},
}


def compute(loss, options):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator)
    # What an ignored row holds is nobody's business.
    hidden[4, 0] = float("nan")
    hidden.requires_grad_()
    head, bias = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((67, 5), (67,)))
    target = torch.randint(67, (9,), generator=generator)
    target[[1, 4]] = -100
    value, stats = linear_loss(hidden, head, target, loss, linear_bias=bias, chunk_size=4, return_stats=True, **options)
    grads = torch.autograd.grad(value.sum(), (hidden, head, bias))
    with torch.no_grad():
        without = linear_loss(hidden, head, target, loss, linear_bias=bias, chunk_size=4, **options)
    return [value.detach(), without, *grads, stats.nll, stats.correct.float(), stats.target_probability]


def case(loss, options) -> str:
    calls = []

    def forced(logits, batch, plan) -> bool:
        calls.append(1)
        return True

    try:
        expected = compute(loss, options)
        _linear_engine._has_kernel = forced
        found = compute(loss, options)
        assert calls
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6, equal_nan=True)
    except Exception:
        return traceback.format_exc()[-1500:]
    finally:
        _linear_engine._has_kernel = PLAIN
    return "passed"


if __name__ == "__main__":
    pairs = itertools.product(LOSSES.items(), OPTIONS.items())
    print(json.dumps({f"{name}-{kind}": case(loss, options) for (name, loss), (kind, options) in pairs}))
