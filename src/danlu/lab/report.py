"""Outcomes to HTML: one self-contained page per trial, and a gallery of all.

A page needs no network and no other file: style, data and the chart library are inlined, and its content security
policy refuses everything else. The numbers are in tables too, so nothing depends on the script.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, cast
from urllib.parse import quote
from xml.etree import ElementTree

from danlu.lab import charts
from danlu.lab.charts import DARK, LIGHT, PAGE, Spec
from danlu.lab.checkpoint import write_atomically
from danlu.lab.errors import MissingExtraError
from danlu.lab.outcome import ArmOutcome, Outcome, TuningPoint
from danlu.lab.stats import CONFIDENCE, Difference, Part, holm
from danlu.lab.trial import Scalar

if TYPE_CHECKING:
    from types import ModuleType

    from jinja2 import Environment

__all__ = ["write_figure", "write_report"]

_LEVEL = (1 - CONFIDENCE) / 2
# The evidence is the report size; these two are for a first look and for continuous integration.
_SMALL = ("ci", "demo")

_MEANING = {
    "holds": "Every part of the claim is shown, each by a one-sided test at 2.5 %.",
    "holds in part": "Some part of the claim is shown, but not every one.",
    "not resolved at this scale": "The data neither show nor contradict the claim at this scale.",
    "does not hold": "No part of the claim is shown, and some part is contradicted.",
}
_KIND = {
    "holds": "shown",
    "holds in part": "partly",
    "not resolved at this scale": "open",
    "does not hold": "contradicted",
}
_SYMBOL = {"shown": "✓", "partly": "◐", "open": "○", "contradicted": "✕"}
_OPPOSITE = {"lower": "higher", "higher": "lower"}
_MISSING = "–"

# Outlines of Vega's symbols in a box of 12 by 12 around the origin, for the keys beside the charts.
_OUTLINES = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "square": "M-4-4h8v8h-8z",
    "triangle-up": "M0-5L5 4H-5z",
    "triangle-down": "M0 5L5-4H-5z",
    "triangle-right": "M5 0L-4 5V-5z",
    "diamond": "M0-5.5L5 0 0 5.5-5 0z",
    "cross": "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
}


def write_report(outcomes: Sequence[Outcome], folder: Path) -> Path:
    """Write a page per outcome, `<family>-<method>.html`, and the gallery `index.html`.

    Args:
        outcomes: at most one per trial; the gallery shows them by family.
        folder: made if it is missing; other files in it are left alone.

    Returns:
        The path of the gallery.

    Raises:
        ValueError: two outcomes would be written to one file.
        StoreError: the folder cannot be written.
        MissingExtraError: a package of the extra `danlu[lab]` is missing.
    """
    names: dict[str, str] = {}
    for outcome in outcomes:
        name = _file_name(outcome.trial)
        if name in names:
            raise ValueError(f"outcomes has both {names[name]!r} and {outcome.trial!r}, which are one file, {name}")
        names[name] = outcome.trial
    environment = _environment()
    template = environment.get_template("trial.html.j2")
    # The gallery is last: it never links to a page that is not there.
    for outcome in outcomes:
        page = template.render(page=_page(outcome), bundle=_bundle(), light=LIGHT, dark=DARK)
        _write(folder / _file_name(outcome.trial), page.encode())
    index = folder / "index.html"
    gallery = environment.get_template("index.html.j2").render(**_gallery(outcomes), light=LIGHT, dark=DARK)
    _write(index, gallery.encode())
    return index


def write_figure(outcome: Outcome, path: Path) -> Path:
    """Draw the main plot on white: the deciding metric over its conditions, or else its paired scores.

    Args:
        outcome: what to draw.
        path: ends in `.svg` or `.png`.

    Returns:
        The path.

    Raises:
        ValueError: another ending, or no finite score to draw.
        StoreError: the file cannot be written.
        MissingExtraError: `vl_convert` is missing.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"path must end in .svg or .png, got {path.name!r}")
    metric = _lead(outcome).comparison.metric
    spec = charts.condition_chart(outcome, metric.split("@")[0], LIGHT, alone=True)
    spec = spec or charts.paired_chart(outcome, metric, LIGHT, alone=True)
    if spec is None:
        raise ValueError(f"{outcome.trial} has no finite {metric} to draw")
    spec = {**spec, "width": 620, "autosize": {"type": "pad"}, "padding": 12, "background": LIGHT["paper"]}
    converter = _module("vl_convert")
    if path.suffix == ".svg":
        _write(path, cast("str", converter.vegalite_to_svg(spec)).encode())
    else:
        _write(path, cast("bytes", converter.vegalite_to_png(spec, scale=2.0)))
    return path


# ---- files -----------------------------------------------------------------------------------------------------------


def _file_name(trial: str) -> str:
    return re.sub(r"[^\w.-]", "-", trial.replace("/", "-")) + ".html"


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, content)
    # The temporary file was private; a page is there to be served.
    with suppress(OSError):
        path.chmod(0o644)


def _module(name: str) -> "ModuleType":
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the report needs {name}; install it with: pip install 'danlu[lab]'") from error


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script, safe inside a script element."""
    script = cast("str", _module("vl_convert").javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return _module("markupsafe").Markup(re.sub(r"<(?=/script|!--)", r"<\\", script, flags=re.IGNORECASE))


def _environment() -> "Environment":
    jinja2 = _module("jinja2")
    folder = Path(__file__).parent / "templates"
    environment = cast(
        "Environment",
        jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        ),
    )
    environment.filters["prose"] = _prose
    environment.filters["breakable"] = _breakable
    return environment


# ---- the page of a trial ---------------------------------------------------------------------------------------------


def _page(outcome: Outcome) -> dict[str, object]:
    specs: dict[str, Spec] = {}
    states = _states(outcome)
    return {
        "family": outcome.family,
        "method": outcome.trial.partition("/")[2],
        "outcome": outcome,
        "small": outcome.size in _SMALL,
        "finished": _date(outcome.finished),
        "seeds": _seeds(outcome.seeds),
        "verdict": _verdict(outcome, states),
        "equation": _mathml(outcome.equation),
        "parts": [_part(part, state) for part, state in zip(outcome.parts, states, strict=True)],
        "symbols": _SYMBOL,
        "arms": [_look(index, arm) for index, arm in enumerate(outcome.arms)],
        "intervals": _interval_figures(outcome, states, specs),
        "paired": _paired_figures(outcome, specs),
        "conditions": _condition_figures(outcome, specs),
        "curves": _curve_figures(outcome, specs),
        "fits": {name: names for name, names in charts.distinct_fits(outcome).items() if outcome.arm(name).curves},
        "metrics": _metric_rows(outcome),
        "tuning": [_tuning(arm) for arm in outcome.arms],
        "costs": [_cost(arm) for arm in outcome.arms],
        "options": _option_rows(outcome),
        # Last: the figures have filled it.
        "specs": _script_json(specs),
    }


def _figure(specs: dict[str, Spec], spec: Spec, **texts: object) -> dict[str, object]:
    name = f"chart-{len(specs)}"
    specs[name] = spec
    return {"id": name, **texts}


def _interval_figures(outcome: Outcome, states: Sequence[str], specs: dict[str, Spec]) -> list[dict[str, object]]:
    labels = [_part_label(part) for part in outcome.parts]
    lines = [label.replace(": ", "\n", 1) for label in labels]
    return [
        _figure(
            specs,
            spec,
            label="Intervals of the parts. "
            + " ".join(f"{labels[i]}: gain {_gain_text(outcome.parts[i])}, {states[i]}." for i in members),
            margin=any(outcome.parts[i].comparison.margin > 0 for i in members),
        )
        for members, spec in charts.parts_charts(outcome, lines, states, PAGE)
    ]


def _paired_figures(outcome: Outcome, specs: dict[str, Spec]) -> list[dict[str, object]]:
    figures: list[dict[str, object]] = []
    for metric in dict.fromkeys(part.comparison.metric for part in outcome.parts):
        spec = charts.paired_chart(outcome, metric, PAGE)
        if spec is None:
            continue
        texts = [f"{arm.name} {_mean_text(arm.metrics[metric])}" for arm in outcome.arms if metric in arm.metrics]
        lost = sum(not math.isfinite(v) for arm in outcome.arms for v in arm.metrics.get(metric, {}).values())
        direction = outcome.direction(metric)
        label = f"{metric} of every seed, by arm. Means: {'; '.join(texts)}."
        figures.append(_figure(specs, spec, metric=metric, label=label, lost=lost, direction=direction))
    return figures


def _condition_figures(outcome: Outcome, specs: dict[str, Spec]) -> list[dict[str, object]]:
    figures: list[dict[str, object]] = []
    for stem, conditions in charts.stems(outcome).items():
        spec = charts.condition_chart(outcome, stem, PAGE)
        if spec is None:
            continue
        texts = [
            f"{arm.name}: "
            + ", ".join(f"{c} {_mean_text(arm.metrics[m])}" for c in conditions if (m := f"{stem}@{c}") in arm.metrics)
            for arm in outcome.arms
        ]
        label = f"{stem} over {', '.join(conditions)}. Means by arm. {'; '.join(texts)}."
        figures.append(_figure(specs, spec, stem=stem, label=label, direction=outcome.direction(stem)))
    return figures


def _curve_figures(outcome: Outcome, specs: dict[str, Spec]) -> list[dict[str, object]]:
    figures: list[dict[str, object]] = []
    for name in charts.curve_names(outcome):
        drawn = charts.curve_chart(outcome, name, PAGE)
        if drawn is None:
            continue
        spec, cut = drawn
        label = f"Learning curves of {name} over steps: a thin line per fit, a thick line for the mean of each arm."
        figures.append(_figure(specs, spec, name=name, label=label, cut=cut))
    return figures


# ---- verdict and parts -----------------------------------------------------------------------------------------------


def _states(outcome: Outcome) -> list[str]:
    """What is shown of each part, by the rule of the verdict: Holm's correction unless the claim holds as a whole."""
    if outcome.verdict == "holds":
        return ["shown"] * len(outcome.parts)
    better = holm({str(i): part.p_better for i, part in enumerate(outcome.parts)})
    worse = holm({str(i): part.p_worse for i, part in enumerate(outcome.parts)})
    return [
        "shown" if better[str(i)] < _LEVEL else "contradicted" if worse[str(i)] < _LEVEL else "open"
        for i in range(len(outcome.parts))
    ]


def _lead(outcome: Outcome) -> Part:
    """The part that speaks for the verdict.

    If only some parts agree with the verdict, one of those. Then the first that asks for "better" in the metric that
    the claim names first: "not worse" alone is seldom why a method exists.
    """
    wanted = {"holds in part": "shown", "does not hold": "contradicted"}.get(outcome.verdict)
    states = zip(outcome.parts, _states(outcome), strict=True)
    parts = [part for part, state in states if wanted in (None, state)] or list(outcome.parts)
    better = [part for part in parts if part.comparison.margin == 0 and _stem(part) == _stem(parts[0])]
    return (better or parts)[0]


def _stem(part: Part) -> str:
    return part.comparison.metric.split("@")[0]


def _verdict(outcome: Outcome, states: Sequence[str]) -> dict[str, str]:
    lead = _lead(outcome)
    sentence = _sentence(outcome, lead)
    if math.isfinite(lead.gain.mean):
        sentence += f" over {lead.gain.count} seeds"
    if len(states) > 1:
        if states.count("shown") == len(states):
            sentence += f"; all {len(states)} parts of the claim are shown"
        else:
            tally = [f"{states.count(kind)} {kind}" for kind in ("shown", "contradicted", "open") if kind in states]
            sentence += f"; of the {len(states)} parts of the claim: {', '.join(tally)}"
    kind = _KIND[outcome.verdict]
    return {
        "word": outcome.verdict,
        "kind": kind,
        "symbol": _SYMBOL[kind],
        "sentence": f"{sentence}.",
        "meaning": _MEANING[outcome.verdict],
    }


def _sentence(outcome: Outcome, part: Part) -> str:
    """What came out of one part, in words."""
    one, gain = part.comparison, part.gain
    if not math.isfinite(gain.mean):
        lost = [_losses(outcome.arm(name), one.metric) for name in (one.candidate, one.baseline)]
        return (
            f"{one.candidate} and {one.baseline} have no paired {one.metric}: {_list([text for text in lost if text])}"
        )
    word = one.better if gain.mean >= 0 else _OPPOSITE[one.better]
    decimals = _decimals(gain.high - gain.low, gain.mean)
    low, high = (gain.low, gain.high) if gain.mean >= 0 else (-gain.high, -gain.low)
    amount = f"{_fixed(abs(gain.mean), decimals)} [{_fixed(low, decimals)}, {_fixed(high, decimals)}]"
    allowed = f" (up to {_plain(one.margin)} {_OPPOSITE[one.better]} is allowed)" if one.margin > 0 else ""
    return f"{one.candidate} reached {one.metric} {word} by {amount} than {one.baseline}{allowed}"


def _losses(arm: ArmOutcome, metric: str) -> str:
    values = arm.metrics.get(metric, {}).values()
    lost = sum(not math.isfinite(value) for value in values)
    return f"{arm.name} is not finite in {lost} of {len(values)} seeds" if lost else ""


def _need(part: Part) -> str:
    one = part.comparison
    if one.margin > 0:
        return f"not {_OPPOSITE[one.better]} by more than {_plain(one.margin)}"
    return one.better


def _part_label(part: Part) -> str:
    one = part.comparison
    return f"{one.candidate} against {one.baseline}: {one.metric} {_need(part)}"


def _part(part: Part, state: str) -> dict[str, object]:
    gain, decimals = part.gain, _decimals(part.gain.high - part.gain.low, part.gain.mean)
    finite = math.isfinite(gain.mean)
    return {
        "comparison": part.comparison,
        "need": _need(part),
        "gain": _fixed(gain.mean, decimals, sign=True),
        "interval": f"[{_fixed(gain.low, decimals)}, {_fixed(gain.high, decimals)}]" if finite else _MISSING,
        "p": _p_value(part.p_better) if finite else _MISSING,
        "flip": "from 6 seeds on" if gain.sign_flip is None else _p_value(gain.sign_flip),
        "state": state,
        # The correction over the parts can leave a part open whose own interval clears the line.
        "corrected": state == "open" and min(part.p_better, part.p_worse) < _LEVEL,
    }


def _gain_text(part: Part) -> str:
    decimals = _decimals(part.gain.high - part.gain.low, part.gain.mean)
    low, high = _fixed(part.gain.low, decimals), _fixed(part.gain.high, decimals)
    return f"{_fixed(part.gain.mean, decimals, sign=True)}, from {low} to {high}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def _metric_rows(outcome: Outcome) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for metric in dict.fromkeys(metric for arm in outcome.arms for metric in arm.metrics):
        direction = outcome.direction(metric)
        means = {
            arm.name: fmean(values.values())
            for arm in outcome.arms
            if (values := arm.metrics.get(metric)) and all(map(math.isfinite, values.values()))
        }
        best = (min if direction == "lower" else max)(means.values(), default=None) if direction else None
        cells = [
            {
                "text": _mean_text(arm.metrics.get(metric, {})),
                "best": best is not None and means.get(arm.name) == best and len(means) > 1,
                "note": _losses(arm, metric).removeprefix(f"{arm.name} is "),
            }
            for arm in outcome.arms
        ]
        rows.append({"metric": metric, "direction": direction, "cells": cells})
    return rows


def _mean_text(values: Mapping[int, float]) -> str:
    """Mean ± standard deviation over seeds, of the finite ones; a note elsewhere says how many are missing."""
    finite = [value for value in values.values() if math.isfinite(value)]
    if not finite:
        return "NaN" if values else _MISSING
    mean = fmean(finite)
    if len(finite) == 1:
        return _fixed(mean, _decimals(0.0, mean))
    # Half of the spread is the step that `_decimals` thinks in.
    spread = stdev(finite)
    decimals = _decimals(2 * spread, mean)
    return f"{_fixed(mean, decimals)} ± {_fixed(spread, decimals) if spread else '0'}"


def _tuning(arm: ArmOutcome) -> dict[str, object]:
    scores = sorted(point.score for point in arm.tuning if math.isfinite(point.score))
    gaps = [b - a for a, b in pairwise(scores) if b > a]
    # Enough digits to tell the best two apart, and never fewer than four significant ones.
    decimals = max(_decimals(2 * min(gaps, default=0.0), 0.0), _decimals(0.0, scores[-1] if scores else 0.0))
    return {
        "arm": arm.name,
        "points": [
            {
                "options": _options_text(point.options),
                "score": _fixed(point.score, min(decimals, 6)),
                "chosen": _is_chosen(point, arm),
            }
            for point in arm.tuning
        ],
        "edge": [f"{option} = {_plain(arm.chosen[option])}" for option in arm.edge if option in arm.chosen],
    }


def _is_chosen(point: TuningPoint, arm: ArmOutcome) -> bool:
    return all(arm.chosen.get(option, value) == value for option, value in point.options.items())


def _cost(arm: ArmOutcome) -> dict[str, object]:
    costs = list(arm.costs.values())
    memory = [cost.peak_memory for cost in costs if cost.peak_memory is not None]
    state = max((cost.optimizer_state for cost in costs), default=0)
    parameters = max((cost.parameters for cost in costs), default=0)
    return {
        "arm": arm.name,
        "seconds": _mean_text({i: cost.seconds for i, cost in enumerate(costs)}),
        "memory": _bytes(max(memory)) if memory else _MISSING,
        "state": _bytes(state),
        "per_parameter": f"{state / parameters:.2f}" if parameters else _MISSING,
        "parameters": f"{parameters:,}",
        "shared": bool(costs) and all(cost.shared for cost in costs),
    }


def _option_rows(outcome: Outcome) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for option in dict.fromkeys(option for arm in outcome.arms for option in arm.options):
        cells = [_plain(arm.options[option]) if option in arm.options else _MISSING for arm in outcome.arms]
        rows.append({"option": option, "cells": cells, "differs": len(set(cells)) > 1})
    # What tells the arms apart comes first.
    return sorted(rows, key=lambda row: not row["differs"])


def _look(index: int, arm: ArmOutcome) -> dict[str, object]:
    color, shape, dash = charts.style(index)
    dashes = "" if dash == charts.DASHES[0] else " ".join(map(str, dash))
    return {"name": arm.name, "method": arm.method, "color": color, "outline": _OUTLINES[shape], "dash": dashes}


# ---- the gallery -----------------------------------------------------------------------------------------------------


def _gallery(outcomes: Sequence[Outcome]) -> dict[str, object]:
    # A claim holds if all its parts do, so its p-value is that of its weakest part.
    p_values = {outcome.trial: max(part.p_better for part in outcome.parts) for outcome in outcomes}
    adjusted = holm(p_values)
    families: dict[str, list[dict[str, object]]] = {}
    for outcome in sorted(outcomes, key=lambda one: one.trial):
        lead, p = _lead(outcome), adjusted[outcome.trial]
        families.setdefault(outcome.family, []).append(
            {
                "outcome": outcome,
                "method": outcome.trial.partition("/")[2],
                "href": quote(_file_name(outcome.trial)),
                "verdict": _verdict(outcome, _states(outcome)),
                "sentence": _sentence(outcome, lead),
                "p": _p_value(p),
                "lost": outcome.verdict == "holds" and p >= _LEVEL,
                "small": outcome.size in _SMALL,
                "strip": _strip(lead.gain, lead.comparison.margin),
                "margin": lead.comparison.margin > 0,
            }
        )
    words = [outcome.verdict for outcome in outcomes]
    tally = [
        {"word": word, "kind": kind, "symbol": _SYMBOL[kind], "count": words.count(word)}
        for word, kind in _KIND.items()
        if word in words
    ]
    margins = any(_lead(outcome).comparison.margin > 0 for outcome in outcomes)
    return {"families": families, "count": len(outcomes), "tally": tally, "margins": margins}


def _strip(gain: Difference, margin: float) -> dict[str, float] | None:
    """Positions, from 0 to 100, of an interval, its mean and the lines it is held against."""
    ends = (gain.low, gain.high, 0.0, -margin)
    if not all(map(math.isfinite, ends)):
        return None
    low, high = min(ends), max(ends)
    scale = 92 / (high - low) if high > low else 0.0

    def place(value: float) -> float:
        return round(4 + (value - low) * scale, 2)

    positions = {"low": place(gain.low), "high": place(gain.high), "mean": place(gain.mean), "zero": place(0.0)}
    return {**positions, "need": place(-margin)}


# ---- texts -----------------------------------------------------------------------------------------------------------


def _decimals(width: float, value: float) -> int:
    """Decimals that give half the width of an interval two digits; without a width, the value at most four."""
    if not math.isfinite(width) or not math.isfinite(value):
        return 0
    if width > 1e-9 * abs(value):
        digits = 1 - math.floor(math.log10(width / 2))
    else:
        # A width of rounding error is none.
        digits = max(0, -cast("int", Decimal(f"{value:.4g}").normalize().as_tuple().exponent))
    return min(max(digits, 0), 15)


def _fixed(value: float, decimals: int, *, sign: bool = False) -> str:
    """A number with a true minus sign; very large and very small ones in scientific notation."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if abs(value) >= 1e7 or (decimals > 8 and value):
        text = f"{value:.3g}"
    else:
        text = f"{value:.{decimals}f}"
        if float(text) == 0:
            text = text.removeprefix("-")
    return ("+" if sign and not text.startswith("-") and float(text) != 0 else "") + text.replace("-", "−")


def _p_value(p: float) -> str:
    if not math.isfinite(p):
        return _MISSING
    if p < 1e-4:
        return "< 0.0001"
    if p > 0.99:
        return "> 0.99"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"


def _plain(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _options_text(options: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{name} = {_plain(value)}" for name, value in options.items()) or _MISSING


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _date(moment: str) -> str:
    try:
        return f"{datetime.fromisoformat(moment).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return moment


def _prose(text: str) -> str:
    """Paragraphs, with `code` in backticks; everything else is escaped."""
    markup = _module("markupsafe").Markup
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph]
    marked = [re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(paragraph)) for paragraph in paragraphs]
    return markup("".join(f"<p>{paragraph}</p>" for paragraph in marked))


def _breakable(text: object) -> str:
    """A long name that may break after a separator, so that it does not widen a narrow page."""
    escaped = html.escape(str(text))
    return _module("markupsafe").Markup(re.sub(r"([_@./])(?=\w)", r"\1<wbr>", escaped))


def _mathml(equation: str) -> str | None:
    """MathML of LaTeX; None if the converter cannot read it."""
    latex = equation.strip().strip("$").strip().replace("{aligned}", "{align*}")
    if not latex:
        return None
    converter = _module("latex2mathml.converter")
    try:
        root = cast("ElementTree.Element", converter.convert_to_element(latex, display="block"))
    except Exception:  # The converter has no base class for what it raises on malformed input.
        return None
    # It writes symbols as entities and leaves text unescaped; the serializer escapes all of it once.
    for node in root.iter():
        if node.text:
            node.text = html.unescape(node.text)
    return _module("markupsafe").Markup(ElementTree.tostring(root, encoding="unicode"))


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    escapes = {"<": r"\u003c", ">": r"\u003e", "&": r"\u0026", "\u2028": r"\u2028", "\u2029": r"\u2029"}
    return _module("markupsafe").Markup(_replaced(text, escapes.items()))


def _replaced(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text
