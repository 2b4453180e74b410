"""Other maps at the output, under label noise: Taylor softmax and the maximum under normal noise."""

from danlu.lab.tasks.sparse_outputs import SparseOutputs
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_LRS = ({"lr": 0.001}, {"lr": 0.003}, {"lr": 0.01}, {"lr": 0.0003})


def _equal(candidate: str) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(candidate=one, baseline=other, metric="accuracy", better="higher", margin=0.02)
        for one, other in ((candidate, "softmax"), ("softmax", candidate))
    )


TRIAL = Trial(
    claim=(
        "With 20 % wrong labels Taylor softmax (order 2) and the probabilities of a maximum under normal noise make no "
        "difference to softmax in accuracy (to 0.02)."
    ),
    source="“通向概率分布之路:盘点Softmax及其替代品” (2024-06-14); arXiv 1511.05042",
    equation=r"p_i\propto\sum_{m\le k}\frac{x_i^m}{m!},\qquad p_i=P\big[\operatorname{argmax}_j(x_j+\epsilon_j)=i\big]",
    task=SparseOutputs(),
    arms={
        "softmax": Arm(grid=_LRS),
        "taylor_softmax": Arm(options={"output": "taylor_softmax"}, grid=_LRS, method="danlu.simplex.taylor_softmax"),
        "perturb_normal": Arm(options={"output": "perturb_normal"}, grid=_LRS, method="danlu.simplex.perturb_max"),
    },
    decides=(*_equal("taylor_softmax"), *_equal("perturb_normal")),
    selects=("accuracy", "higher"),
    sizes={
        "ci": Budget(steps=20, seeds=3, grid=2, options={"label_noise": 0.2, "width": 32}),
        "demo": Budget(steps=270, seeds=5, options={"label_noise": 0.2}),
        "report": Budget(steps=540, seeds=10, tuning_seeds=2, options={"label_noise": 0.2}),
    },
    notes="540 steps are 30 epochs. Validation labels are as noisy as the training labels.",
)
