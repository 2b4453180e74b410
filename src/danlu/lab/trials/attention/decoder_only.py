"""Attention in both directions over the input of a continuation, and over masked text, against what is half causal."""

from danlu.lab.tasks.mask_kind_bytes import MaskKindBytes
from danlu.lab.trial import Arm, Budget, Comparison, Trial

_LRS = ({"lr": 0.006}, {"lr": 0.003}, {"lr": 0.012})
_FUNCTION = "danlu.attention.split_attention"


def _continued(kind: str) -> Arm:
    return Arm(options={"kind": kind}, grid=_LRS, method=_FUNCTION)


def _guessed(kind: str) -> Arm:
    return Arm(options={"objective": "masked", "kind": kind}, grid=_LRS, method=_FUNCTION)


def _fewer_bits(candidate: str, baseline: str, margin: float = 0.0) -> Comparison:
    return Comparison(candidate=candidate, baseline=baseline, metric="bits_per_byte", better="lower", margin=margin)


TRIAL = Trial(
    claim=(
        "With equal parameters, attention in both directions over the input brings nothing for its continuation: "
        "causal attention is not worse by more than 0.02 bits per byte, and its matrices have a higher effective rank. "
        "Where masked bytes are guessed, heads or layers that look back and ahead by turns are better than those that "
        "look both ways."
    ),
    source="“为什么现在的LLM都是Decoder-only的架构?” (2023-03-17) and its FAQ (2023-03-20)",
    equation=(
        r"A_{ij}\propto e^{q_i\cdot k_j/\sqrt d}\,[\,j\le i\,],\qquad \det A=\prod_i A_{ii}>0,\qquad "
        r"\text{prefix: } [\,j\le i\text{ or } i,j<P\,]"
    ),
    task=MaskKindBytes(),
    arms={
        "causal": _continued("causal"),
        "prefix": _continued("prefix"),
        "mixed_input": _continued("forward_backward"),
        "masked_bidirectional": _guessed("bidirectional"),
        "masked_mixed_heads": _guessed("forward_backward"),
        "masked_mixed_layers": _guessed("alternate"),
    },
    decides=(
        _fewer_bits("causal", "prefix", margin=0.02),
        Comparison(candidate="causal", baseline="prefix", metric="effective_rank", better="higher"),
        _fewer_bits("masked_mixed_heads", "masked_bidirectional"),
        _fewer_bits("masked_mixed_layers", "masked_bidirectional"),
    ),
    selects=("bits_per_byte", "lower"),
    sizes={
        "ci": Budget(
            steps=6, seeds=3, grid=1, options={"width": 16, "context": 32, "batch_size": 4, "heads": 2, "windows": 8}
        ),
        "demo": Budget(steps=100, seeds=3, grid=1),
        "report": Budget(steps=240, seeds=5),
        "gpu": Budget(
            steps=4000,
            seeds=5,
            options={
                "device": "cuda",
                "context": 512,
                "width": 384,
                "layers": 6,
                "heads": 6,
                "batch_size": 64,
            },
        ),
    },
    notes=(
        "Of 128 bytes the first 64 are the input, and the loss is that of the others; in `mixed_input` the odd heads "
        "look ahead, inside of the input. Of masked text 15 % are to be guessed. Two layers of width 64 and 240 steps "
        "are small beside the article's 10^9 parameters, and its masked models of 10^8: what is slow to learn is not "
        "seen here. Bits of a continuation and of masked bytes are not of one task; compare within."
    ),
)
