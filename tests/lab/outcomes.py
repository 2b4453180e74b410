"""Outcomes as the runner makes them, with drawn scores: for tests of what is made from an outcome."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from danlu.lab.outcome import ArmOutcome, FitCost, Outcome, TuningPoint
from danlu.lab.stats import verdict, weigh
from danlu.lab.trial import Comparison, Scalar

__all__ = ["arm", "curves", "hostile", "many_arms", "outcome", "rerope_like", "tailr_like", "tiger_like"]

ENVIRONMENT: dict[str, Scalar] = {
    "danlu": "0.1.0",
    "commit": "3f1c9b2a7d4e5f60718293a4b5c6d7e8f9012345",
    "dirty": False,
    "python": "3.11.7",
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "scikit-learn": "1.9.0",
    "system": "Linux",
    "machine": "x86_64",
    "processor": "Example CPU @ 2.10GHz",
    "cores": 2,
    "accelerator": "none",
}


def curves(seed: int, steps: int, end: float, start: float = 5.5) -> dict[str, list[tuple[int, float]]]:
    """A falling loss that ends near `end`, and a sparse curve of another unit."""
    rng = np.random.default_rng(seed)
    stride = max(1, steps // 60)
    at = [*range(stride, steps + 1, stride)]
    loss = [(s, end + (start - end) * math.exp(-8 * s / steps) + 0.03 * float(rng.standard_normal())) for s in at]
    rate = [(s, 0.01 * (1 - s / steps)) for s in at[:: max(1, len(at) // 8)]]
    return {"train_loss": loss, "lr": rate}


def arm(
    name: str,
    metrics: Mapping[str, Sequence[float]],
    *,
    method: str = "",
    steps: int = 600,
    tuning: Sequence[tuple[dict[str, Scalar], float]] = (),
    chosen: Mapping[str, Scalar] | None = None,
    edge: Sequence[str] = (),
    options: Mapping[str, Scalar] | None = None,
    shared: bool = False,
    fit: int = 0,
    optimizer_state: int = 3_361_792,
) -> ArmOutcome:
    """An arm with scores per seed; arms with the same `fit` have the same curves and costs."""
    count = len(next(iter(metrics.values())))
    rng = np.random.default_rng(100 + fit)
    return ArmOutcome(
        name=name,
        method=method,
        chosen=dict(chosen or {}),
        options={"width": 128, "layers": 4, **(options or {}), **(chosen or {})},
        tuning=tuple(TuningPoint(point, score) for point, score in tuning),
        edge=tuple(edge),
        metrics={metric: dict(enumerate(map(float, values))) for metric, values in metrics.items()},
        costs={
            seed: FitCost(20.0 + float(rng.normal()), 212_000_000 + seed * 4096, optimizer_state, 420_224, shared)
            for seed in range(count)
        },
        curves={seed: curves(1000 * fit + seed, steps, 1.7 + 0.03 * fit) for seed in range(count)},
    )


def outcome(
    trial: str, arms: Sequence[ArmOutcome], decides: Sequence[Comparison], *, size: str = "report", **changes: object
) -> Outcome:
    """An outcome whose parts and verdict follow from the scores of its arms."""
    by_name = {one.name: one for one in arms}
    parts = tuple(
        weigh(
            part,
            [*by_name[part.candidate].metrics[part.metric].values()],
            [*by_name[part.baseline].metrics[part.metric].values()],
        )
        for part in decides
    )
    made = Outcome(
        trial=trial,
        claim="The candidate is better than the baseline.",
        source="An article (2026-01-01)",
        equation="",
        notes="",
        size=size,
        seeds=tuple(next(iter(arms[0].metrics.values()))),
        steps=600,
        verdict=verdict(parts),
        parts=parts,
        arms=tuple(arms),
        data={
            "name": "Python standard library",
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "license": "PSF-2.0",
            "split": "36 of 734 files held out by a hash of the path",
        },
        environment=ENVIRONMENT,
        command=f"danlu run {trial} --size {size}",
        finished="2026-11-20T12:34:56+00:00",
        published=True,
    )
    return replace(made, **changes)  # pyrefly: ignore


def _scores(rng: np.random.Generator, mean: float, common: np.ndarray, spread: float) -> list[float]:
    return [*(mean + common + spread * rng.standard_normal(len(common)))]


def rerope_like(**changes: object) -> Outcome:
    """One shared fit, a metric over four lengths, a part with a margin: holds."""
    rng = np.random.default_rng(0)
    means = {
        "rope": (2.312, 3.104, 4.051, 4.732),
        "rerope": (2.317, 2.381, 2.522, 2.861),
        "window": (2.313, 2.342, 2.351, 2.360),
    }
    common = 0.03 * rng.standard_normal(5)
    arms: list[ArmOutcome] = []
    for name, levels in means.items():
        metrics = {
            f"bits_per_byte@{length}x": _scores(rng, level, common, 0.004 * length)
            for length, level in zip((1, 2, 4, 8), levels, strict=True)
        }
        grid: list[tuple[dict[str, Scalar], float]] = []
        if name == "rerope":
            grid = [({"window": w}, score) for w, score in ((16, 2.61), (32, 2.512), (64, 2.509))]
        arms.append(
            arm(
                name,
                metrics,
                method="" if name == "window" else f"danlu.attention.{name}_attention",
                tuning=grid,
                chosen={"window": 64} if grid else {},
                edge=("window",) if grid else (),
                options={"attention": name, "context": 128},
                shared=True,
            )
        )
    decides = (
        Comparison(candidate="rerope", baseline="rope", metric="bits_per_byte@4x", better="lower"),
        Comparison(candidate="rerope", baseline="rope", metric="bits_per_byte@8x", better="lower"),
        Comparison(candidate="rerope", baseline="rope", metric="bits_per_byte@1x", better="lower", margin=0.05),
    )
    claim = (
        "A model trained with rotary positions reads text four and eight times its training length better when "
        "distances beyond a window `w` are held constant, without further training and without loss inside it."
    )
    equation = (
        r"\begin{aligned} s_{ij} &= q_i^\top \mathcal{R}_{\min(i-j,\,w)}\, k_j \\ "
        r"p_{ij} &= \frac{e^{s_{ij}}}{\sum_{l\le i} e^{s_{il}}} \end{aligned}"
    )
    made = outcome(
        "attention/rerope",
        arms,
        decides,
        claim=claim,
        source="Transformer升级之路:12、无限外推的ReRoPE? (2023-08-07)",
        equation=equation,
        notes="The same trained weights serve all arms.\n\nA plain `window` of the training length is the arm to beat.",
    )
    return replace(made, **changes)  # pyrefly: ignore


def tiger_like(**changes: object) -> Outcome:
    """Tuned optimizers, one metric, eight seeds, a small difference with a shared component: not resolved."""
    rng = np.random.default_rng(7)
    common = 0.02 * rng.standard_normal(8)
    levels = {"tiger": 2.094, "lion": 2.101, "adamw": 2.097}
    bytes_per_parameter = {"tiger": 4, "lion": 4, "adamw": 8}
    arms = [
        arm(
            name,
            {"bits_per_byte": _scores(rng, level, common, 0.012)},
            method=f"danlu.optim.{name.title()}" if name != "adamw" else "torch.optim.AdamW",
            tuning=[({"lr": lr}, level + bump) for lr, bump in ((3e-4, 0.09), (1e-3, 0.01), (3e-3, 0.04))],
            chosen={"lr": 1e-3},
            options={"optimizer": name, "weight_decay": 0.01},
            fit=index,
            optimizer_state=420_224 * bytes_per_parameter[name],
        )
        for index, (name, level) in enumerate(levels.items())
    ]
    decides = (Comparison(candidate="tiger", baseline="adamw", metric="bits_per_byte", better="lower"),)
    made = outcome(
        "optim/tiger",
        arms,
        decides,
        claim="Tiger reaches a lower loss than AdamW with half of its optimizer state.",
        source="Tiger:一个“抠”到极致的优化器 (2023-03-07)",
        equation=(
            r"m_t = \beta m_{t-1} + (1-\beta)\, g_t, \qquad "
            r"\theta_t = \theta_{t-1} - \alpha_t\left[\mathrm{sign}(m_t) + \lambda_t \theta_{t-1}\right]"
        ),
    )
    return replace(made, **changes)  # pyrefly: ignore


def tailr_like(**changes: object) -> Outcome:
    """A negative result: worse accuracy than cross entropy, calibration open."""
    rng = np.random.default_rng(3)
    common = 0.004 * rng.standard_normal(5)
    arms = [
        arm(
            name,
            {
                "accuracy@clean": _scores(rng, accuracy, common, 0.002),
                "accuracy@20% noise": _scores(rng, accuracy - 0.06 - drop, common, 0.003),
                "accuracy@40% noise": _scores(rng, accuracy - 0.17 - drop, common, 0.005),
                "calibration_error": _scores(rng, 0.04, common, 0.006),
            },
            method=f"danlu.losses.{name}",
            tuning=[({"gamma": gamma, "lr": 1e-3}, accuracy - 0.01 * i) for i, gamma in enumerate(grid)],
            chosen={"gamma": grid[0], "lr": 1e-3} if grid else {},
            edge=("gamma",) if grid else (),
            fit=index,
        )
        for index, (name, accuracy, drop, grid) in enumerate(
            (("tailr_loss", 0.912, 0.03, (1e-5, 1e-4, 1e-3)), ("cross_entropy", 0.931, 0.0, ()))
        )
    ]
    decides = (
        Comparison(candidate="tailr_loss", baseline="cross_entropy", metric="accuracy@20% noise", better="higher"),
        Comparison(candidate="tailr_loss", baseline="cross_entropy", metric="calibration_error", better="lower"),
    )
    made = outcome(
        "losses/tailr",
        arms,
        decides,
        size="demo",
        claim="TaiLr classifies better than cross entropy where labels are noisy, and is better calibrated.",
        source="Tailoring Language Generation Models under Total Variation Distance, arXiv 2302.13344",
        equation=r"\mathcal{L} = -\frac{p_y}{\gamma + (1-\gamma)\, p_y} \log p_y",
    )
    return replace(made, **changes)  # pyrefly: ignore


def hostile(**changes: object) -> Outcome:
    """Everything that may go wrong in a page: markup in every string, diverged fits, one point, huge numbers."""
    bad = "<img src=x onerror=\"alert('x')\"> & </script><!-- 'quoted' `tick` 丹炉"
    metric = f"loss<b>@{bad}"
    arms = [
        arm("plain", {metric: (1.0, 1.5, 2.0), "only@one": (1e30, 1e30, 1e30)}, method=bad, options={bad: bad}),
        arm(bad, {metric: (0.5, math.nan, 0.7)}, chosen={"lr": math.nan}, tuning=[({"lr": 0.1}, math.nan)], fit=1),
        arm("infinite", {metric: (math.inf, math.inf, -math.inf), "flat": (0.25, 0.25, 0.25)}, fit=2),
    ]
    arms[1] = replace(arms[1], curves={0: {bad: [(1, 3.0)]}, 1: {bad: [(1, math.nan)]}, 2: {bad: [(1, math.inf)]}})
    arms[2] = replace(arms[2], curves={}, costs={})
    decides = (
        Comparison(candidate=bad, baseline="plain", metric=metric, better="lower"),
        Comparison(candidate="plain", baseline="infinite", metric=metric, better="lower", margin=1e-12),
    )
    texts = {"claim": bad, "source": bad, "notes": bad, "equation": r"\text{</math><script>alert(1)</script>} & x < y"}
    made = outcome(
        "local/café <x>", arms, decides, size="ci", published=False, data={bad: bad}, environment={bad: bad}, **texts
    )
    return replace(made, command=bad, finished=bad, **changes)  # pyrefly: ignore


def many_arms(**changes: object) -> Outcome:
    """Nine arms with long names, twenty seeds, metrics of several units, one of them the same for every seed."""
    rng = np.random.default_rng(11)
    common = 0.02 * rng.standard_normal(20)
    arms = [
        arm(
            f"arm_with_a_rather_long_name_{index}",
            {
                **{
                    f"bits_per_byte@{c}": _scores(rng, 2 + 0.03 * index, common, 0.02) for c in ("train", "near", "far")
                },
                "optimizer_bytes_per_parameter": [4.0 + 4 * (index % 2)] * 20,
            },
            tuning=[({"lr": 10.0**-k, "beta": 0.9, "weight_decay": 0.1}, 2 + k / 7) for k in range(2, 6)],
            chosen={"lr": 0.01, "beta": 0.9, "weight_decay": 0.1},
            options={f"option_{k}": k for k in range(20)},
            fit=index,
        )
        for index in range(9)
    ]
    first, second = arms[0].name, arms[1].name
    decides = (
        Comparison(candidate=first, baseline=second, metric="bits_per_byte@far", better="lower", margin=0.02),
        Comparison(candidate=first, baseline=arms[8].name, metric="bits_per_byte@far", better="lower"),
        Comparison(candidate=second, baseline=first, metric="optimizer_bytes_per_parameter", better="lower"),
    )
    return replace(outcome("optim/many", arms, decides), **changes)  # pyrefly: ignore
