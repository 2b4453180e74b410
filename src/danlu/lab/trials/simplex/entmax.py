"""Sparse attention weights against softmax: how many keys are read, and at what accuracy."""

from danlu.lab.tasks.sparse_attention import SparseAttention
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_LRS = ({"lr": 0.01}, {"lr": 0.03}, {"lr": 0.1}, {"lr": 0.003})


def _no_worse_with_fewer_keys(candidate: str) -> tuple[Comparison, ...]:
    return (
        Comparison(candidate=candidate, baseline="softmax", metric="accuracy", better="higher", margin=0.01),
        Comparison(candidate=candidate, baseline="softmax", metric="perplexity", better="lower"),
    )


TRIAL = Trial(
    claim=(
        "Attention weights by entmax (alpha 1.25 and 1.5) and sparsemax are as accurate as softmax's (to 0.01) and "
        "read fewer keys."
    ),
    source="“通向概率分布之路:盘点Softmax及其替代品” (2024-06-14); arXiv 1905.05702, 1909.00015",
    equation=r"p=\big[(\alpha-1)\,x-\lambda\big]_+^{1/(\alpha-1)},\qquad\textstyle\sum_i p_i=1",
    task=SparseAttention(),
    arms={
        "softmax": Arm(grid=_LRS),
        "taylor_softmax": Arm(options={"map": "taylor_softmax"}, grid=_LRS, method="danlu.simplex.taylor_softmax"),
        "entmax125": Arm(options={"map": "entmax125"}, grid=_LRS, method="danlu.simplex.entmax"),
        "entmax15": Arm(options={"map": "entmax15"}, grid=_LRS, method="danlu.simplex.entmax15"),
        "sparsemax": Arm(options={"map": "sparsemax"}, grid=_LRS, method="danlu.simplex.sparsemax"),
    },
    decides=tuple(
        part for candidate in ("entmax125", "entmax15", "sparsemax") for part in _no_worse_with_fewer_keys(candidate)
    ),
    selects=("accuracy", "higher"),
    sizes={
        "ci": Budget(steps=20, seeds=3, grid=2, options={"width": 16}),
        "demo": Budget(steps=300, seeds=5, grid=2),
        "report": Budget(steps=900, seeds=5),
    },
    notes=(
        "900 steps are 37 epochs of 1200 digits. A sparse map passes no gradient to the keys that it does not read, "
        "so it learns more slowly. `perplexity` counts keys by their weight, `nonzero` those above 0, of 64."
    ),
)
