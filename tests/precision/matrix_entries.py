"""How to call every public name of the package, for the matrix of precisions; one entry per name.

An entry builds a differentiable call from float32 leaves. A name that computes nothing, or nothing differentiable, is
exempt, with the reason.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import danlu.activations as activations
import danlu.attention as attention
import danlu.losses as losses
import danlu.optim as optim
import danlu.positions as positions
import danlu.simplex as simplex

__all__ = ["EXEMPT", "OPERATIONS", "OPTIMIZERS", "WHOLE_STEPS", "Operation"]


@dataclass(frozen=True)
class Operation:
    """A differentiable call.

    Args:
        call: of the leaves; returns a floating tensor.
        leaves: shapes of the float32 tensors that require gradients.
        tolerance: of result and gradients in bf16 and fp16 relative to their largest element, in units of the dtype's
            spacing at 1; the inputs alone are rounded by half of one.
        whole_graph: empty if `torch.compile(fullgraph=True)` takes it, else the reason why not, which is tested.
        positive: whether the leaves are probabilities.
        refusal: part of the error, which tells the remedy, if no compiled code may run it even in several graphs.
    """

    call: Callable[..., Tensor]
    leaves: tuple[tuple[int, ...], ...]
    tolerance: float = 8.0
    whole_graph: str = ""
    positive: bool = False
    refusal: str = ""


TARGET = torch.tensor([0, 2, -100, 6, 3, 5])
MEANING = torch.linspace(-1, 1, 21).sin().view(7, 3)
SHARES = torch.linspace(0, 2, 42).view(6, 7).softmax(-1)
FREQUENCIES = positions.rope_frequencies(8)
SLOTS = torch.arange(6)
QKV = ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8))
PADDING = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
ROTARY = positions.RotaryEmbedding(8)


NET = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
SAMPLES = torch.linspace(-1, 2, 30).view(6, 5)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
SECOND = "compiled code has no second derivative: the call stays outside of it"
FINITE = "a compiler does not trace gradients that are taken and parameters that move within; it breaks the graph there"


def penalized(penalty, exact=True):
    """A gradient penalty of a small network, whose weights are leaves, and its input if it is exact."""

    def call(*leaves: Tensor) -> Tensor:
        x, first, second = leaves if exact else (SAMPLES, *leaves)
        # What the documentation says of float16: it is too narrow, compute this loss in float32.
        narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.is_autocast_enabled("cpu") and not narrow):
            return functional_call(
                Penalized(penalty),
                {"net.0.weight": first.float(), "net.2.weight": second.float()},
                x.float() if narrow else x,
            )

    return Operation(
        call,
        ((6, 5), (8, 5), (3, 8))[not exact :],
        whole_graph=SECOND if exact else FINITE,
        tolerance=12.0,
        refusal="penalize the uncompiled model" if exact else "",
    )


class Penalized(nn.Module):
    def __init__(self, penalty):
        super().__init__()
        self.net = NET
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        return self.penalty(self.net, lambda: F.cross_entropy(self.net(x).float(), LABELS, reduction="none"), x)


def linear(loss):
    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(hidden, weight)

    return Operation(call, ((6, 5), (7, 5)))


MARGIN = losses.MarginSoftmaxLoss(5, 7, temperature=0.5)
SPANS = torch.tensor([[0, 1, 0, 2], [1, 0, 3, 3], [1, 2, 2, 5]])
SPAN_HEADS = ((2, 3, 6, 8), (2, 3, 6, 8))
POINTER = attention.GlobalPointer(8, 3, head_size=4)
EFFICIENT = attention.EfficientGlobalPointer(8, 3, head_size=4)
# Codewords far apart: a rounded key must not be nearest to another one.
CODEBOOK = 3.0 * torch.eye(8)[:4].expand(2, 4, 8)
QUANTIZER = attention.VectorQuantizer(4, 8, 2).eval()
QUANTIZER.set_codebook(CODEBOOK)
LAYER = attention.VQAttention(8, num_heads=1, num_codes=2, block_size=2, window=2).eval()
FAVOR = attention.FavorFeatures(8, 6, generator=torch.Generator().manual_seed(0))
LABEL_SETS = torch.tensor([[0, 2, -1], [3, -1, -1], [6, 5, 4], [-1, -1, -1]])


def shown(scores: Tensor) -> Tensor:
    """Scores of hidden spans are infinite."""
    return scores.masked_fill(scores.isinf(), 0.0)


def read_in_parts(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Linear attention over four tokens and two more."""
    first, state = attention.linear_attention_step(*(x[:, :, :4] for x in (query, key, value)), chunk_size=2)
    second, _ = attention.linear_attention_step(*(x[:, :, 4:] for x in (query, key, value)), state, chunk_size=2)
    return torch.cat((first, second), dim=2)


def two_passes(z: Tensor) -> Tensor:
    """R-Drop of two passes whose difference is fixed."""
    passes = [z, z.flip(-1)]
    return losses.rdrop(lambda: passes.pop(), lambda s: s.float().square().mean())


OPERATIONS: dict[str, Operation] = {
    "attention.EfficientGlobalPointer": Operation(lambda h: shown(EFFICIENT(h, PADDING)), ((2, 6, 8),)),
    "attention.GlobalPointer": Operation(lambda h: shown(POINTER(h, PADDING)), ((2, 6, 8),)),
    "losses.global_pointer_loss": Operation(
        lambda q, k: losses.global_pointer_loss(q, k, SPANS, reduction="none"), SPAN_HEADS
    ),
    "losses.multilabel_cross_entropy": Operation(
        lambda z: losses.multilabel_cross_entropy(z, LABEL_SETS, sparse=True), ((4, 7),)
    ),
    "losses.rdrop": Operation(two_passes, ((4, 7),)),
    "losses.symmetric_kl": Operation(lambda s, t: losses.symmetric_kl(s, t), ((4, 7), (4, 7))),
    "losses.symmetric_kl:softmax": Operation(lambda s, t: losses.symmetric_kl(s, t, kind="softmax"), ((4, 7), (4, 7))),
    "activations.SquarePlus": Operation(lambda x: activations.SquarePlus("softplus")(x), ((4, 7),)),
    "activations.SquarePlus:in_place": Operation(lambda x: activations.SquarePlus(inplace=True)(x * 1.0), ((4, 7),)),
    "activations.squareplus": Operation(lambda x, raw: activations.squareplus(x, raw.float().square()), ((4, 7), (1,))),
    "activations.squareplus:cpp": Operation(lambda x: activations.squareplus(x, impl="cpp"), ((4, 7),)),
    "attention.FavorFeatures": Operation(
        lambda q, k: torch.cat([x.flatten() for x in FAVOR(q, k, PADDING)]), QKV[:2], tolerance=16.0
    ),
    "attention.LinearAttention": Operation(
        lambda q, k, v: attention.LinearAttention("exp", rope_base=100.0)(q, k, v, PADDING), QKV, tolerance=12.0
    ),
    "attention.SoftVQFeatures": Operation(
        lambda q, k, c: torch.cat([x.flatten() for x in attention.SoftVQFeatures(c.float(), sigma=1.0)(q, k, PADDING)]),
        (*QKV[:2], (5, 8)),
        tolerance=24.0,
    ),
    "attention.feature_map": Operation(
        lambda q, k: torch.cat([x.flatten() for x in attention.feature_map("elu1")(q, k, PADDING)]), QKV[:2]
    ),
    "attention.linear_attention": Operation(
        lambda q, k, v: attention.linear_attention(q.square(), k.square(), v, chunk_size=2, key_padding_mask=PADDING),
        QKV,
        tolerance=16.0,
    ),
    "attention.linear_attention_step": Operation(
        lambda q, k, v: read_in_parts(q.square(), k.square(), v), QKV, tolerance=16.0
    ),
    "attention.ReRoPE": Operation(lambda q, k, v: attention.ReRoPE(window=3)(q, k, v, PADDING), QKV),
    "attention.rerope_attention": Operation(
        lambda q, k, v: attention.rerope_attention(q, k, v, window=3, slope=0.5, key_padding_mask=PADDING), QKV
    ),
    "attention.rerope_attention:bands": Operation(
        lambda q, k, v: attention.rerope_attention(
            q, k, v, window=3, slope=0.5, key_padding_mask=PADDING, backend="banded"
        ),
        QKV,
    ),
    "attention.rerope_decode": Operation(
        lambda q, k, v: attention.rerope_decode(q[:, :, -1:], k, v, window=3, slope=0.5, key_padding_mask=PADDING), QKV
    ),
    "attention.dynamic_rope_attention": Operation(
        lambda q, k, v: attention.dynamic_rope_attention(q, k, v, train_length=3, step=8), QKV
    ),
    "attention.split_attention": Operation(
        lambda q, k, v: attention.split_attention(q, k, v, kind="prefix", prefix_lengths=3, key_padding_mask=PADDING),
        QKV,
    ),
    "attention.split_attention:rows": Operation(
        lambda q, k, v: attention.split_attention(q, k, v, kind="prefix", prefix_lengths=3), QKV
    ),
    "attention.split_attention:heads": Operation(
        lambda q, k, v: attention.split_attention(q, k, v, kind="forward_backward"), QKV
    ),
    "attention.rope_attention": Operation(
        lambda q, k, v: attention.rope_attention(q, k, v, key_padding_mask=PADDING), QKV
    ),
    "attention.VQAttention": Operation(lambda h: LAYER(h, PADDING)[0], ((2, 6, 8),)),
    "attention.VectorQuantizer": Operation(lambda k: QUANTIZER(k, PADDING)[0], ((2, 2, 6, 8),)),
    "attention.vq_attention": Operation(
        lambda q, k, v: attention.vq_attention(q, k, v, CODEBOOK, block_size=2, key_padding_mask=PADDING), QKV
    ),
    "losses.GradientPenalty": penalized(
        lambda net, loss, x: losses.GradientPenalty(net, input=0.1, parameter=0.1)(loss, x)
    ),
    "losses.input_gradient_penalty": penalized(lambda net, loss, x: losses.input_gradient_penalty(loss(), x)),
    "losses.parameter_gradient_penalty": penalized(
        lambda net, loss, x: losses.parameter_gradient_penalty(loss, net)[1]
    ),
    "losses.parameter_gradient_penalty:finite_difference": penalized(
        # Passes in bfloat16 need a large step; gradients reach the weights only.
        lambda net, loss, x: losses.parameter_gradient_penalty(loss, net, method="finite_difference", radius=0.5)[1],
        exact=False,
    ),
    "losses.parameter_gradient_penalty:per_sample": penalized(
        lambda net, loss, x: losses.parameter_gradient_penalty(loss, net, scope="per_sample")[1]
    ),
    "losses.EMO": linear(
        lambda h, w: losses.linear_loss(h, w, TARGET, losses.EMO(cost_embedding=MEANING, mode="fixed"), chunk_size=4)
    ),
    "losses.EMOLoss": Operation(lambda z: losses.EMOLoss(MEANING, mode="fixed")(z, TARGET), ((6, 7),)),
    "losses.GeneralizedCE": linear(lambda h, w: losses.linear_loss(h, w, TARGET, losses.GeneralizedCE())),
    "losses.MixCE": linear(lambda h, w: losses.linear_loss(h, w, TARGET, losses.MixCE())),
    "losses.RowFunction": linear(lambda h, w: losses.linear_loss(h, w, TARGET, losses.RowFunction(torch.square))),
    "losses.emo_bound": Operation(lambda z: losses.emo_bound(z, SHARES, cost_embedding=MEANING), ((6, 7),)),
    "losses.emo_loss": Operation(
        lambda z: losses.emo_loss(z, TARGET, cost_embedding=MEANING, label_smoothing=0.1), ((6, 7),)
    ),
    "losses.generalized_cross_entropy": Operation(
        lambda z: losses.generalized_cross_entropy(z, TARGET, q=0.6), ((6, 7),)
    ),
    "losses.linear_emo_loss": linear(
        lambda h, w: losses.linear_emo_loss(h, w, TARGET, cost_embedding="head", mode="pure", chunk_size=4)
    ),
    "losses.mixce_loss": Operation(lambda z: losses.mixce_loss(z, TARGET, label_smoothing=0.1), ((6, 7),)),
    "losses.CrossEntropy": linear(lambda h, w: losses.linear_loss(h, w, TARGET, losses.CrossEntropy(0.1))),
    "losses.EntmaxLoss": Operation(lambda z: losses.EntmaxLoss(1.25)(z, TARGET), ((6, 7),)),
    "losses.MarginSoftmaxLoss": Operation(
        lambda h, w: functional_call(MARGIN, {"weight": w}, (h, TARGET)), ((6, 5), (7, 5))
    ),
    "losses.SparseSoftmaxLoss": Operation(lambda z: losses.SparseSoftmaxLoss(k=3)(z, TARGET), ((6, 7),)),
    "losses.SparsemaxLoss": Operation(lambda z: losses.SparsemaxLoss()(z, TARGET), ((6, 7),)),
    "losses.entmax_loss": Operation(lambda z: losses.entmax_loss(z, TARGET), ((6, 7),)),
    "losses.linear_sparse_softmax_loss": linear(
        lambda h, w: losses.linear_sparse_softmax_loss(h, w, TARGET, k=3, chunk_size=4)
    ),
    "losses.linear_margin_softmax_loss": linear(
        lambda h, w: losses.linear_margin_softmax_loss(h, w, TARGET, temperature=0.5, chunk_size=4)
    ),
    "losses.margin_softmax_loss": Operation(
        lambda z: losses.margin_softmax_loss(z.tanh(), TARGET, kind="arcface", temperature=0.5), ((6, 7),)
    ),
    "losses.sparse_softmax_loss": Operation(lambda z: losses.sparse_softmax_loss(z, TARGET, k=3), ((6, 7),)),
    "losses.sparsemax_loss": Operation(lambda z: losses.sparsemax_loss(z, TARGET), ((6, 7),)),
    "losses.TaiLr": linear(lambda h, w: losses.linear_loss(h, w, TARGET, losses.TaiLr(0.3, min_weight=0.2))),
    "losses.TaiLrLoss": Operation(lambda z: losses.TaiLrLoss(0.3)(z, TARGET), ((6, 7),)),
    "losses.linear_loss": linear(lambda h, w: losses.linear_loss(h, w, TARGET, losses.CrossEntropy(), chunk_size=4)),
    "losses.linear_tailr_loss": linear(lambda h, w: losses.linear_tailr_loss(h, w, TARGET, gamma=0.3, chunk_size=4)),
    "losses.tailr_loss": Operation(lambda z: losses.tailr_loss(z, TARGET, gamma=0.3, label_smoothing=0.1), ((6, 7),)),
    "losses.topk_multilabel_loss": Operation(
        lambda z: losses.topk_multilabel_loss(z, torch.arange(28).view(4, 7) % 3 == 0), ((4, 7),)
    ),
    "losses.tailr_unbias": Operation(lambda p: losses.tailr_unbias(p, gamma=0.1), ((3, 7),), positive=True),
    "positions.RotaryEmbedding": Operation(lambda x: ROTARY(x), ((2, 6, 8),)),
    "positions.alibi_bias": Operation(lambda s: positions.alibi_bias(s, SLOTS, SLOTS), ((4,),)),
    "positions.apply_rope": Operation(lambda x: positions.apply_rope(x, SLOTS, FREQUENCIES), ((2, 6, 8),)),
    "simplex.Entmax": Operation(lambda z: simplex.Entmax(1.25)(z), ((4, 7),), tolerance=12.0),
    "simplex.Entmax15": Operation(lambda z: simplex.Entmax15(dim=0)(z), ((4, 7),)),
    "simplex.PerturbMax": Operation(lambda z: simplex.PerturbMax(noise="logistic")(z), ((4, 7),)),
    "simplex.SparseSoftmax": Operation(lambda z: simplex.SparseSoftmax(p=0.8)(z), ((4, 7),)),
    "simplex.Sparsemax": Operation(lambda z: simplex.Sparsemax()(z), ((4, 7),)),
    "simplex.TaylorSoftmax": Operation(lambda z: simplex.TaylorSoftmax(order=4, shift="mean")(z), ((4, 7),)),
    "simplex.entmax": Operation(
        lambda z, a: simplex.entmax(z, 1.0 + a.float().sigmoid()), ((4, 7), (4, 1)), tolerance=16.0
    ),
    "simplex.entmax15": Operation(
        lambda z: simplex.entmax15(z.masked_fill(TARGET[:4, None] == 2, -math.inf)), ((4, 7),)
    ),
    "simplex.perturb_max": Operation(lambda z: simplex.perturb_max(z, nodes=24), ((4, 7),)),
    "simplex.SoftTopK": Operation(lambda z: simplex.SoftTopK(3, method="sigmoid")(z), ((4, 7),), tolerance=8.0),
    "simplex.log_esp": Operation(lambda z: simplex.log_esp(z, 3), ((4, 7),)),
    "simplex.soft_topk": Operation(
        lambda z: simplex.soft_topk(z.masked_fill(TARGET[:4, None] == 2, -math.inf), 2, temperature=0.7),
        ((4, 7),),
        tolerance=8.0,
    ),
    "simplex.Softmax": Operation(lambda z: simplex.Softmax(temperature=0.5)(z), ((4, 7),)),
    "simplex.softmax": Operation(
        lambda z: simplex.softmax(z.masked_fill(TARGET[:4, None] == 2, -math.inf), temperature=2.0), ((4, 7),)
    ),
    "simplex.sparse_softmax": Operation(lambda z: simplex.sparse_softmax(z, k=3), ((4, 7),)),
    "simplex.sparsemax": Operation(lambda z: simplex.sparsemax(z, impl="reference"), ((4, 7),)),
    "simplex.taylor_softmax": Operation(lambda z: simplex.taylor_softmax(z), ((4, 7),)),
}


def model() -> nn.Sequential:
    """Embedding, norm, vectors and matrices: every kind of parameter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


# Called with a model and options of the class; `:` sets off what else a class can be.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "optim.HybridOptimizer": lambda net: optim.HybridOptimizer(
        net, {"embedding": (torch.optim.AdamW, {"lr": 0.01}), "default": (optim.Tiger, {"lr": 0.01})}
    ),
    "optim.Amos": lambda net, **options: optim.Amos(net, lr=0.05, **options),
    "optim.Amos:momentum": lambda net, **options: optim.Amos(net, lr=0.05, momentum=0.9, **options),
    "optim.EGSGD": lambda net, **options: optim.EGSGD(net.parameters(), lr=0.1, **options),
    "optim.EGStepSize": lambda net, **options: optim.EGStepSize("sgdm", net.parameters(), lr=0.05, **options),
    "optim.EGStepSize:adam": lambda net, **options: optim.EGStepSize("adam", net.parameters(), lr=0.01, **options),
    "optim.EGStepSize:wrapped": lambda net, **options: optim.EGStepSize(
        torch.optim.AdamW(net.parameters(), lr=0.01), **options
    ),
    "optim.ExponentiatedGradient": lambda net, **options: optim.ExponentiatedGradient(
        net.parameters(), lr=0.1, mode="signed", **options
    ),
    "optim.FoldedAdamW": lambda net, **options: optim.FoldedAdamW(net.parameters(), lr=0.01, **options),
    "optim.Lion": lambda net, **options: optim.Lion(optim.parameter_groups(net, weight_decay=0.1), lr=0.01, **options),
    "optim.Tiger": lambda net, **options: optim.Tiger(net, lr=0.01, **options),
    "optim.UpdateNormalized": lambda net, **options: optim.UpdateNormalized(
        torch.optim.Adam(net.named_parameters(), lr=1.0), alpha0=0.05, sigma="rms", **options
    ),
}

# Whose `step` is one graph. The others ask for numbers, build kernels, or go another way for a bad gradient: a compiler
# breaks the graph there.
WHOLE_STEPS = {"optim.FoldedAdamW"}

EXEMPT: dict[str, str] = {
    "losses.LinearStats": "a record",
    "attention.BackendChoice": "a record",
    "attention.ReRoPECache": "keeps no graph; rerope_decode and rerope_attention are its steps",
    "attention.LinearAttentionState": "a record",
    "attention.AttentionMask": "a record",
    "attention.attention_mask": "booleans",
    "attention.block_mask": "booleans",
    "attention.decode_spans": "comparisons, integers",
    "attention.explain_backend": "a report",
    "attention.Quantized": "a record",
    "attention.VQState": "a record",
    "attention.init_codebook_from_keys": "sets codewords, without a gradient; half keys are computed in float32",
    "diagnostics.SpanScores": "a record",
    "diagnostics.span_f1": "sets of integers",
    "losses.virtual_adversarial_loss": "draws and differentiates by itself; symmetric_kl is its value, see its tests",
    "flows.Entropy": "a term of WassersteinFlow",
    "flows.FDivergence": "a term of WassersteinFlow",
    "flows.GaussianFlow": "a record",
    "flows.GradientTrajectory": "a record",
    "flows.Interaction": "a term of WassersteinFlow",
    "flows.KL": "a term of WassersteinFlow",
    "flows.ParticleTrajectory": "a record",
    "flows.Potential": "a term of WassersteinFlow",
    "flows.WassersteinFlow": "takes float32 and float64 particles and refuses others; its velocities carry no graph",
    "flows.gradient_flow": "takes float32 and float64 points and refuses others; differentiates by itself",
    "flows.jko_step": "takes float32 and float64 particles and refuses others; solves by itself",
    "flows.ornstein_uhlenbeck": "closed forms with eigenvalues, in float32 and float64; refuses others",
    "flows.steepest_direction": "one formula per norm in the dtype of its input; tested for its dtypes with the family",
    "diagnostics.AttentionRankReport": "a record",
    "diagnostics.attention_rank_report": "a diagnostic in float64 without gradients; half weights in its tests",
    "diagnostics.attention_sparsity": "a diagnostic without gradients; half weights in its tests",
    "diagnostics.attention_weights": "a diagnostic without gradients; half inputs and autocast in its tests",
    "diagnostics.linear_attention_sparsity_bound": "a diagnostic without gradients; half weights in the tests",
    "diagnostics.sparsity_of_gaussian": "closed formulas in float64 without gradients; dtypes in its tests",
    "diagnostics.EmbeddingHealth": "a record",
    "diagnostics.embedding_health": "a diagnostic in float64 without gradients; half tables in its tests",
    "diagnostics.Emergence": "a record",
    "diagnostics.GradientPenaltyBound": "a record",
    "diagnostics.JointFit": "a record",
    "diagnostics.MultitaskSparseParity": "draws bits and labels, integers; its scores are without gradients",
    "diagnostics.PowerLawFit": "a record",
    "diagnostics.QuantaModel": "a closed formula of Python numbers, without an input that autocast could touch",
    "diagnostics.QuantaRelation": "a record",
    "diagnostics.ScalingExponents": "a record",
    "diagnostics.TaskScores": "a record",
    "diagnostics.check_quanta_relation": "compares two fits, Python numbers",
    "diagnostics.fit_joint": "a fit in float64 of measured numbers, without a gradient",
    "diagnostics.fit_power_law": "a fit in float64 of measured numbers, without a gradient",
    "diagnostics.gradient_penalty_bound": "both sides of an inequality, computed without a graph; a diagnostic",
    "diagnostics.learning_times": "reads a table of losses after training, without a gradient",
    "optim.Rounding": "how an optimizer writes back half parameters; its own dtypes are those of test_rounding.py",
    "optim.amos": "the function behind Amos: it updates in place and has no gradient; run through the class",
    "optim.amos_scales": "reads the kinds of modules, Python numbers",
    "optim.amos_strategy": "builds a given optimizer or UpdateNormalized; computes no step itself",
    "optim.equivalent_beta": "a formula of Python numbers",
    "optim.folded_adamw": "the function behind FoldedAdamW: it updates in place; run through the class",
    "optim.inverse_square": "a schedule, Python numbers only",
    "optim.inverse_time": "a schedule, Python numbers only",
    "optim.lion": "the function behind Lion: it updates in place and has no gradient; run through the class",
    "optim.parameter_groups": "sorts parameters, computes nothing",
    "optim.piecewise_linear": "a schedule, Python numbers only",
    "optim.tie_embeddings": "changes modules, computes nothing; gradients of the tied model in test_tie_embeddings.py",
    "optim.tiger": "the function behind Tiger: it updates in place and has no gradient; run through the class",
    "attention.LayerPlan": "a record",
    "attention.hwfa_layer_plan": "a plan, Python numbers",
    "attention.window_mask": "comparisons of integers",
    "positions.RandomPositionCollator": "adds random position ids to a batch of data, without a gradient",
    "positions.dynamic_factor": "Python numbers",
    "positions.RandomizedPositions": "a handle",
    "positions.randomize_positions": "adds random position ids to what a model is given, without a gradient",
    "positions.alibi_slopes": "a float64 table from integers, without an input that autocast could touch",
    "positions.even_positions": "a float64 table from integers",
    "positions.scale_frequencies": "a float64 table, detached from the frequencies that it stretches",
    "positions.logn_scale": "a float64 table from integers",
    "positions.random_positions": "numbers of tokens, without an input that autocast could touch",
    "positions.rope_frequencies": "a float64 table from integers, without an input that autocast could touch",
    "simplex.Noise": "a record of two functions",
    "simplex.perturb_argmax_sample": "counts of random draws, integers; its dtypes in test_perturb_max.py",
    "precision.CompileReport": "a record",
    "precision.Finding": "a record",
    "precision.ModeReport": "a record",
    "precision.PrecisionReport": "a record",
    "precision.StepRecord": "a record",
    "precision.TrainStep": "sets the precision itself; run in every precision by test_train_step.py",
    "precision.audit_precision": "a diagnostic that sets the precision itself; see test_audit.py",
    "precision.mask_value": "a number per dtype; compiled by test_mask_value.py",
    "precision.precision_report": "a measurement that sets the precision itself; see test_report.py",
}
