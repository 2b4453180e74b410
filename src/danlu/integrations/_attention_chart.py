"""The picture of what the attention of a model reads, by layer and head."""

from collections.abc import Mapping, Sequence

import torch

from danlu.integrations._attention_rows import STATISTICS, RowSample

__all__ = ["attention_chart", "short_names"]


def attention_chart(statistic: str, layers: Mapping[str, RowSample]) -> dict[str, object]:
    """Vega-Lite: what 90 % of a layer's rows are between, medians of its heads, and these by layer and head."""
    index = STATISTICS.index(statistic)
    labels, pattern = short_names(list(layers))
    heads: list[dict[str, object]] = []
    spans: list[dict[str, object]] = []
    for order, (label, found) in enumerate(zip(labels, layers.values(), strict=True)):
        # Nothing to draw where no row saw enough.
        if not len(found.values):
            continue
        values = found.values[:, index]
        low, high = values.flatten().nanquantile(torch.tensor([0.05, 0.95])).tolist()
        layer = {"layer": label, "order": order}
        spans.append({**layer, "low": low, "high": high})
        heads += [{**layer, "head": i, "value": v} for i, v in enumerate(values.nanquantile(0.5, dim=0).tolist())]
    # Numbers of keys span orders of magnitude.
    scale = {"type": "log" if statistic.startswith("n_eff") else "linear", "zero": False}
    x = {"field": "layer", "type": "nominal", "sort": {"field": "order"}, "title": None}
    x |= {"axis": {"labelAngle": 0 if max(map(len, labels)) <= 3 else -90}}

    def y(field: str) -> dict[str, object]:
        axis = {"tickCount": 5, "gridOpacity": 0.5}
        return {"field": field, "type": "quantitative", "title": statistic, "scale": scale, "axis": axis}

    color = {"field": "value", "type": "quantitative", "title": "median", "scale": {**scale, "scheme": "viridis"}}
    color |= {"legend": {"format": ".3~g", "gradientLength": 90}}
    row = {"field": "head", "type": "ordinal", "title": "head"}
    width = max(240, 24 * len(labels))
    by_row = {
        "title": f"{statistic}: median of each head, and 5 to 95 % of all rows",
        "width": width,
        "layer": [
            {
                "data": {"values": spans},
                "mark": {"type": "bar", "opacity": 0.25, "size": 14},
                "encoding": {"x": x, "y": y("low"), "y2": {"field": "high"}},
            },
            {
                "data": {"values": heads},
                "mark": {"type": "point", "filled": True, "size": 30},
                "encoding": {"x": x, "y": y("value")},
            },
        ],
    }
    by_head = {
        "width": width,
        "height": {"step": 14},
        "data": {"values": heads},
        "mark": "rect",
        "encoding": {"x": {**x, "title": pattern}, "y": row, "color": color},
    }
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "vconcat": [by_row, by_head],
        "resolve": {"legend": {"color": "independent"}},
    }


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """What tells the names apart, and how they are made of it."""
    parts = [name.split(".") for name in names]
    if len(parts) == 1:
        return [names[0] or "model"], "layer"
    shortest = min(map(len, parts)) - 1
    front = next((i for i in range(shortest) if len({tuple(p[: i + 1]) for p in parts}) > 1), shortest)
    back = next((i for i in range(shortest - front) if len({tuple(p[-i - 1 :]) for p in parts}) > 1), shortest - front)
    labels = [".".join(p[front : len(p) - back]) for p in parts]
    return labels, ".".join((*parts[0][:front], "*", *parts[0][len(parts[0]) - back :]))
