"""Losses with exact zeros in their probabilities against cross entropy: accuracy and candidate sets."""

from danlu.lab.tasks.sparse_outputs import SparseOutputs
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_LRS = ({"lr": 0.001}, {"lr": 0.003}, {"lr": 0.01}, {"lr": 0.0003})


def _no_worse(candidate: str) -> tuple[Comparison, ...]:
    return (
        Comparison(candidate=candidate, baseline="softmax", metric="accuracy", better="higher", margin=0.005),
        Comparison(candidate=candidate, baseline="softmax", metric="support", better="lower"),
    )


TRIAL = Trial(
    claim=(
        "The Fenchel-Young losses of entmax-1.5 and sparsemax are as accurate as cross entropy (to 0.005) and give "
        "small candidate sets."
    ),
    source="“通向概率分布之路:盘点Softmax及其替代品” (2024-06-14); arXiv 1901.02324, 2112.12433",
    equation=r"L_t(x)=\langle p,x\rangle+\frac{1-\sum_i p_i^\alpha}{\alpha(\alpha-1)}-x_t,\qquad\nabla L_t=p-e_t",
    task=SparseOutputs(),
    arms={
        "softmax": Arm(grid=_LRS),
        "entmax15": Arm(options={"output": "entmax15"}, grid=_LRS, method="danlu.losses.entmax_loss"),
        "sparsemax": Arm(options={"output": "sparsemax"}, grid=_LRS, method="danlu.losses.sparsemax_loss"),
        "sparse_softmax": Arm(
            options={"output": "sparse_softmax"}, grid=_LRS, method="danlu.losses.sparse_softmax_loss"
        ),
    },
    decides=(*_no_worse("entmax15"), *_no_worse("sparsemax")),
    selects=("accuracy", "higher"),
    sizes={
        "ci": Budget(steps=40, seeds=3, grid=2, options={"width": 32}),
        "demo": Budget(steps=540, seeds=5),
        "report": Budget(steps=1080, seeds=10, tuning_seeds=2),
    },
    notes=(
        "540 steps are 30 epochs. `true_in_support` says how often the right class is among the candidates; cross "
        "entropy's 10 candidates always hold it. Sparse softmax keeps 5 classes by definition."
    ),
)
