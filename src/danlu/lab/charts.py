"""Vega-Lite specifications of the report's charts, as plain dicts; nothing is drawn here.

Every color goes through a theme, so that a page can name CSS variables (and follow the reader's light or dark setting
and the printer without redrawing) where a static picture names the colors themselves. Every axis gets an explicit
domain, because Vega draws an empty frame for a domain of one point.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import cast

from danlu.lab.outcome import Outcome
from danlu.lab.stats import Part

__all__ = [
    "DARK",
    "DASHES",
    "LIGHT",
    "PAGE",
    "SHAPES",
    "Spec",
    "Theme",
    "condition_chart",
    "curve_chart",
    "curve_names",
    "distinct_fits",
    "paired_chart",
    "parts_charts",
    "stems",
    "style",
]

Spec = dict[str, object]
Theme = Mapping[str, str]
Row = dict[str, object]

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'PingFang SC', 'Noto Sans CJK SC', "
    "'Microsoft YaHei', sans-serif"
)

# Arms: Okabe and Ito's hues, darkened (light page) or lightened (dark page) until each has contrast 3 to the paper.
LIGHT: Theme = {
    "paper": "#ffffff",
    "wash": "#f5f7f9",
    "line": "#d5dbe1",
    "faint": "#8e99a4",
    "soft": "#57616b",
    "ink": "#1a1f24",
    "accent": "#0b5cad",
    "cinnabar": "#a8321a",
    "shown": "#00705a",
    "partly": "#7a5a00",
    "open": "#57616b",
    "contradicted": "#b03a10",
    "arm-0": "#0072b2",
    "arm-1": "#c4500a",
    "arm-2": "#00795a",
    "arm-3": "#a83c82",
    "arm-4": "#8a6a00",
    "arm-5": "#2f86ad",
    "arm-6": "#4d4d4d",
    "arm-7": "#7a3b1d",
}
DARK: Theme = {
    "paper": "#14181c",
    "wash": "#1c2228",
    "line": "#343c44",
    "faint": "#74808b",
    "soft": "#a3adb7",
    "ink": "#e7eaed",
    "accent": "#79b8ff",
    "cinnabar": "#f0866b",
    "shown": "#4fd1ab",
    "partly": "#e3bd55",
    "open": "#a3adb7",
    "contradicted": "#f4905f",
    "arm-0": "#5cb8f0",
    "arm-1": "#f4905f",
    "arm-2": "#3fcf9f",
    "arm-3": "#e394cb",
    "arm-4": "#e3bd55",
    "arm-5": "#9ad4ea",
    "arm-6": "#bdbdbd",
    "arm-7": "#cf9b7c",
}
PAGE: Theme = {name: f"var(--{name})" for name in LIGHT}

_COLORS = 8
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (7, 3), (2, 2), (9, 3, 2, 3), (4, 4))

# Beyond this a number is as good as infinite for a picture, and differences of two of them overflow.
_LARGEST = 1e300
# Parts whose extents differ by more than this factor do not share an axis: the short interval would be a dot.
_COMPARABLE = 8.0
# Scores that differ by more than this factor are drawn on a logarithmic axis.
_WIDE = 20.0
# Widths of the key of a picture that stands alone: of all of it, of a letter, and of a symbol with its gaps.
_KEY_WIDTH, _LETTER, _SYMBOL = 620, 7, 40
# More points of one curve than this are thinned out evenly.
_POINTS = 120
# The first steps of a curve may fall from far above; they are cut off when they would squeeze the rest this much.
_TRANSIENT, _SQUEEZE = 0.1, 2.5


def style(index: int) -> tuple[str, str, tuple[int, ...]]:
    """Theme color, shape and dash of arm number `index`; color and shape together are unique for 56 arms."""
    return f"arm-{index % _COLORS}", SHAPES[index % len(SHAPES)], DASHES[index % len(DASHES)]


def stems(outcome: Outcome) -> dict[str, list[str]]:
    """Metric stems with their conditions in the order in which the arms report them; without `@`, no condition."""
    found: dict[str, list[str]] = {}
    for metric in dict.fromkeys(metric for arm in outcome.arms for metric in arm.metrics):
        stem, _, condition = metric.partition("@")
        conditions = found.setdefault(stem, [])
        if condition:
            conditions.append(condition)
    return found


def curve_names(outcome: Outcome) -> list[str]:
    """Names of the learning curves, in order."""
    return list(dict.fromkeys(name for arm in outcome.arms for seed in arm.curves.values() for name in seed))


def distinct_fits(outcome: Outcome) -> dict[str, list[str]]:
    """The first arm of every set of arms that share their fits, with all arms of that set."""
    groups: dict[str, list[str]] = {}
    for arm in outcome.arms:
        shared = bool(arm.costs) and all(cost.shared for cost in arm.costs.values())
        for first in groups:
            if shared and outcome.arm(first).curves == arm.curves and outcome.arm(first).costs == arm.costs:
                groups[first].append(arm.name)
                break
        else:
            groups[arm.name] = [arm.name]
    return groups


def paired_chart(outcome: Outcome, metric: str, theme: Theme, *, alone: bool = False) -> Spec | None:
    """One row per arm, one point per seed, the points of a seed joined; a tick marks each arm's mean.

    `alone` adds what the page says beside the chart: the name of the metric.
    """
    names = [arm.name for arm in outcome.arms if metric in arm.metrics]
    rows: list[Row] = []
    means: list[Row] = []
    for order, name in enumerate(names):
        values = {seed: value for seed, value in outcome.arm(name).metrics[metric].items() if _drawable(value)}
        rows.extend({"arm": name, "seed": seed, "value": value, "order": order} for seed, value in values.items())
        if values:
            means.append({"arm": name, "value": fmean(values.values())})
    if not rows:
        return None
    y = {**_field("arm"), "axis": None, "scale": {"domain": names}}
    x = _spread_quantity("value", metric if alone else None, _numbers(rows))
    return _spec(
        theme,
        height=42 * len(names),
        layer=[
            {
                "data": {"values": rows},
                "mark": {"type": "line", "strokeWidth": 1, "color": theme["faint"], "opacity": 0.7},
                "encoding": {"x": x, "y": y, "detail": _field("seed"), "order": _field("order", "quantitative")},
            },
            {
                "data": {"values": means},
                "mark": {"type": "tick", "color": theme["ink"], "thickness": 2, "size": 24},
                "encoding": {"x": x, "y": y, "tooltip": [_field("arm"), _number("value", f"mean of {metric}")]},
            },
            {
                "data": {"values": rows},
                "mark": {"type": "point", "filled": True, "size": 62, "opacity": 0.85},
                "encoding": {
                    "x": x,
                    "y": y,
                    **_arms(outcome, names, theme, ("color", "shape"), legend=False),
                    "tooltip": [_field("arm"), _field("seed"), _number("value", metric)],
                },
            },
            *_row_labels([{"arm": name} for name in names], y, "arm", theme, lift=13),
        ],
    )


def parts_charts(
    outcome: Outcome, labels: Sequence[str], states: Sequence[str], theme: Theme
) -> list[tuple[list[int], Spec]]:
    """Intervals of the parts with the line of no difference and, where a part has a margin, the line it must clear.

    Parts in one unit and of one order of magnitude share an axis.

    Args:
        outcome: whose parts are drawn.
        labels: per part, lines separated by line feeds.
        states: "shown", "contradicted" or "open" per part.
        theme: the colors.

    Returns:
        The numbers of the parts drawn together, with the chart; parts without a finite interval are not drawn.
    """
    charts: list[tuple[list[int], Spec]] = []
    for members in _panels(outcome.parts):
        stem = _stem(outcome.parts[members[0]])
        charts.append((members, _parts_panel(outcome, members, stem, labels, states, theme)))
    return charts


def _panels(parts: Sequence[Part]) -> list[list[int]]:
    panels: list[list[int]] = []
    for index, part in enumerate(parts):
        if not all(_drawable(end) for end in _extent(part)):
            continue
        for panel in panels:
            reaches = [_reach(parts[member]) for member in [*panel, index]]
            alike = max(reaches) <= _COMPARABLE * min(reaches)
            if _stem(part) == _stem(parts[panel[0]]) and alike:
                panel.append(index)
                break
        else:
            panels.append([index])
    return panels


def _stem(part: Part) -> str:
    return part.comparison.metric.split("@")[0]


def _extent(part: Part) -> tuple[float, float, float]:
    return part.gain.low, part.gain.high, -part.comparison.margin


def _reach(part: Part) -> float:
    return max(abs(end) for end in _extent(part))


def _parts_panel(
    outcome: Outcome, members: Sequence[int], stem: str, labels: Sequence[str], states: Sequence[str], theme: Theme
) -> Spec:
    rows: list[Row] = []
    for index in members:
        gain, margin = outcome.parts[index].gain, outcome.parts[index].comparison.margin
        row: Row = {"row": index, "low": gain.low, "high": gain.high, "gain": gain.mean}
        rows.append({**row, "label": labels[index], "state": states[index], "need": -margin})
    domain = _domain([0.0, *(end for index in members for end in _extent(outcome.parts[index]))])
    y: Spec = {**_field("row", "ordinal"), "axis": None, "scale": {"domain": list(members)}}
    x = _quantity("gain", f"gain in {stem}", domain)
    x["axis"] = {**cast("Spec", x["axis"]), "grid": False}
    kinds = ["shown", "contradicted", "open"]
    tooltip = [_number("gain"), _number("low"), _number("high"), _field("state")]

    def layer(mark: Spec, encoding: Spec, values: Sequence[Row] = rows) -> Spec:
        return {"data": {"values": values}, "mark": mark, "encoding": encoding}

    color = {**_field("state"), "scale": {"domain": kinds, "range": [theme[k] for k in kinds]}, "legend": None}
    shape = {**_field("state"), "scale": {"domain": kinds, "range": ["circle", "cross", "diamond"]}, "legend": None}
    layers = [
        layer({"type": "rule", "color": theme["faint"]}, {"x": x}, [{"gain": 0}]),
        layer(
            {"type": "tick", "color": theme["contradicted"], "thickness": 2, "size": 22},
            {"x": {**x, "field": "need"}, "y": y},
            [row for row, i in zip(rows, members, strict=True) if outcome.parts[i].comparison.margin > 0],
        ),
        layer(
            {"type": "rule", "strokeWidth": 2.5, "strokeCap": "round"},
            {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "color": color, "tooltip": tooltip},
        ),
        layer(
            {"type": "point", "filled": True, "size": 80, "opacity": 1},
            {"x": x, "y": y, "color": color, "shape": shape, "tooltip": tooltip},
        ),
        *_row_labels(rows, y, "label", theme, lift=32),
    ]
    return _spec(theme, height=68 * len(members), layer=layers)


def condition_chart(outcome: Outcome, stem: str, theme: Theme, *, alone: bool = False) -> Spec | None:
    """A metric over its conditions: one line of means per arm, one point per seed; None without two conditions.

    `alone` adds what the page says beside the chart: the name of the metric and the key of the arms.
    """
    conditions = stems(outcome).get(stem, [])
    if len(conditions) < 2:
        return None
    rows: list[Row] = []
    means: list[Row] = []
    for order, condition in enumerate(conditions):
        for arm in outcome.arms:
            values = arm.metrics.get(f"{stem}@{condition}", {})
            row: Row = {"arm": arm.name, "condition": condition, "order": order}
            drawn = {seed: value for seed, value in values.items() if _drawable(value)}
            rows += [{**row, "seed": seed, "value": value} for seed, value in drawn.items()]
            if drawn:
                means.append({**row, "value": fmean(drawn.values())})
    if not rows:
        return None
    names = [arm.name for arm in outcome.arms if any(row["arm"] == arm.name for row in rows)]
    x = {
        **_field("condition", title="condition"),
        "scale": {"domain": conditions, "type": "point", "padding": 0.3},
        "axis": {"labelAngle": 0, "labelLimit": 90, "labelOverlap": "greedy", "grid": False},
    }
    y = _quantity("value", stem if alone else None, _domain(_numbers(rows)))
    tooltip = [_field("arm"), _field("condition"), _field("seed"), _number("value", stem)]
    return _spec(
        theme,
        height=300,
        layer=[
            {
                "data": {"values": means},
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {
                    "x": x,
                    "y": y,
                    "order": _field("order", "quantitative"),
                    **_arms(outcome, names, theme, ("color", "strokeDash"), legend=alone),
                },
            },
            {
                "data": {"values": rows},
                "mark": {"type": "point", "filled": True, "size": 52, "opacity": 0.75},
                "encoding": {
                    "x": x,
                    "y": y,
                    **_arms(outcome, names, theme, ("color", "shape"), legend=alone),
                    "tooltip": tooltip,
                },
            },
        ],
    )


def curve_chart(outcome: Outcome, name: str, theme: Theme) -> tuple[Spec, bool] | None:
    """A learning curve: a thin line per fit and a mean line per arm; arms that share their fits are drawn once.

    Returns:
        The chart and whether the first steps run out of its frame; None if nothing is finite.
    """
    rows: list[Row] = []
    means: list[Row] = []
    names: list[str] = []
    for first in distinct_fits(outcome):
        curves = {seed: _thin(all_[name]) for seed, all_ in outcome.arm(first).curves.items() if name in all_}
        drawn: list[Row] = [
            {"arm": first, "seed": seed, "step": step, "value": _six_digits(value)}
            for seed, points in curves.items()
            for step, value in points
            if _drawable(value)
        ]
        if not drawn:
            continue
        names.append(first)
        rows.extend(drawn)
        at: dict[int, list[float]] = {}
        for points in curves.values():
            for step, value in points:
                at.setdefault(step, []).append(value)
        # A mean over fewer fits would jump where one of them diverges, so it ends there.
        complete = [(s, v) for s, v in sorted(at.items()) if len(v) == len(curves) and all(map(_drawable, v))]
        means.extend({"arm": first, "step": step, "value": _six_digits(fmean(v))} for step, v in complete)
    if not rows:
        return None
    steps = _numbers(rows, "step")
    last = max(1.0, *steps)
    values = _numbers(rows)
    everything = _domain(values)
    later = _domain(value for value, step in zip(values, steps, strict=True) if step >= _TRANSIENT * max(steps))
    cut = everything[1] - everything[0] > _SQUEEZE * (later[1] - later[0])
    x = _quantity("step", "step", [0.0, last])
    y = _quantity("value", None, later if cut else everything)
    # A line through one point is invisible.
    point: object = {"size": 28} if len(set(steps)) <= 12 else False
    return _spec(
        theme,
        height=260,
        layer=[
            {
                "data": {"values": rows},
                "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.35, "clip": cut, "point": point},
                "encoding": {
                    "x": x,
                    "y": y,
                    "detail": _field("seed"),
                    **_arms(outcome, names, theme, ("color", "strokeDash"), legend=False),
                },
            },
            {
                "data": {"values": means},
                "mark": {"type": "line", "strokeWidth": 2.2, "clip": cut, "point": point},
                "encoding": {
                    "x": x,
                    "y": y,
                    **_arms(outcome, names, theme, ("color", "strokeDash"), legend=False),
                    "tooltip": [_field("arm"), _number("step"), _number("value", f"mean of {name}")],
                },
            },
        ],
    ), cut


def _row_labels(rows: Sequence[Row], y: Spec, field: str, theme: Theme, *, lift: int) -> list[Spec]:
    """Labels above the rows, from the left edge on: beside them, long names would leave a phone no room to plot."""
    text: Spec = {
        "type": "text",
        "align": "left",
        "dy": -lift,
        "fontSize": 12,
        "lineHeight": 15,
        "lineBreak": "\n",
        "limit": {"expr": "width"},
    }
    encoding = {"x": {"value": 0}, "y": y, "text": _field(field)}
    # The paper's color around the letters lifts them off the lines behind.
    halo = {"stroke": theme["paper"], "strokeWidth": 4, "strokeJoin": "round"}
    return [
        {"data": {"values": rows}, "mark": {**text, **look}, "encoding": encoding}
        for look in (halo, {"color": theme["ink"]})
    ]


def _spec(theme: Theme, *, height: int, layer: Sequence[Spec]) -> Spec:
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": 4,
        "background": None,
        "layer": [one for one in layer if one["data"] != {"values": []}],
        "config": {
            "font": _FONT,
            "aria": False,
            "view": {"stroke": None},
            "axis": {
                "labelColor": theme["soft"],
                "titleColor": theme["soft"],
                "gridColor": theme["line"],
                "domainColor": theme["faint"],
                "tickColor": theme["faint"],
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "titleLimit": 600,
                "tickCount": 5,
            },
            "legend": {
                "labelColor": theme["ink"],
                "labelFontSize": 13,
                "labelLimit": 300,
                "orient": "top",
                "symbolSize": 90,
            },
        },
    }


def _arms(
    outcome: Outcome, names: Sequence[str], theme: Theme, channels: Iterable[str], *, legend: bool
) -> dict[str, object]:
    """Encodings that tell arms apart; an arm looks the same in every chart of an outcome."""
    order = [arm.name for arm in outcome.arms]
    looks = [style(order.index(name)) for name in names]
    ranges: dict[str, list[object]] = {
        "color": [theme[color] for color, _, _ in looks],
        "shape": [shape for _, shape, _ in looks],
        "strokeDash": [list(dash) for _, _, dash in looks],
    }
    # Without a width the dashes of the lines would fray the outlines of the symbols.
    key: Spec | None = None
    if legend:
        columns = max(1, _KEY_WIDTH // (_LETTER * max(map(len, names)) + _SYMBOL))
        key = {"title": None, "symbolStrokeWidth": 0, "symbolOpacity": 1, "columns": columns}
    return {
        channel: {**_field("arm"), "scale": {"domain": list(names), "range": ranges[channel]}, "legend": key}
        for channel in channels
    }


def _field(name: str, kind: str = "nominal", *, title: str | None = None) -> Spec:
    return {"field": name, "type": kind, **({"title": title} if title else {})}


def _number(name: str, title: str | None = None) -> Spec:
    return {**_field(name, "quantitative", title=title), "format": ".5~g"}


def _quantity(name: str, title: str | None, domain: Sequence[float]) -> Spec:
    size = max(abs(end) for end in domain)
    # Otherwise Vega writes a loss of 1e30 with thirty zeros.
    axis: Spec = {"format": ".3~e"} if size >= 1e7 or 0 < size < 1e-4 else {}
    return {
        **_field(name, "quantitative"),
        "title": title,
        "scale": {"domain": list(domain), "zero": False, "nice": False},
        "axis": axis,
    }


def _spread_quantity(name: str, title: str | None, values: Sequence[float]) -> Spec:
    """As `_quantity`; logarithmic where one arm's values would otherwise squeeze those of all others."""
    low, high = min(values), max(values)
    if low <= 0 or high < _WIDE * low:
        return _quantity(name, title, _domain(values))
    pad = (high / low) ** 0.06
    found = _quantity(name, title, [low / pad, high * pad])
    return {**found, "scale": {**cast("Spec", found["scale"]), "type": "log"}}


def _domain(values: Iterable[float]) -> list[float]:
    """From a little below the smallest to a little above the largest value; never empty."""
    known = list(values)
    low, high = min(known), max(known)
    pad = 0.06 * (high - low)
    # A pad below the resolution of the numbers leaves the domain empty.
    if pad <= 1e-9 * max(abs(low), abs(high)):
        pad = 0.05 * abs(high) or 0.5
    return [low - pad, high + pad]


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _LARGEST


def _numbers(rows: Iterable[Row], field: str = "value") -> list[float]:
    return [value for row in rows if isinstance(value := row[field], int | float)]


def _six_digits(value: float) -> float:
    """Curves make up most of a page; a picture needs no more."""
    return float(f"{value:.6g}")


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(points) <= _POINTS:
        return list(points)
    step = (len(points) - 1) / (_POINTS - 1)
    return [points[round(i * step)] for i in range(_POINTS)]
