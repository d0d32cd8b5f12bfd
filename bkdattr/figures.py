"""Plotly figures of the entries of `results.json`; each takes the plain value and returns a `Figure`."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bkdattr.tables import setting_text

Json = dict[str, Any]
COLORS = {"asr": "#c0392b", "clean_accuracy": "#2471a3", "false_trigger": "#d68910", "broken": "#7d3c98", "grey": "#909497"}
NAMES = {"asr": "ASR", "clean_accuracy": "clean accuracy", "false_trigger": "false triggers", "broken": "broken"}


def _finish(figure: go.Figure, title: str, height: int = 380) -> go.Figure:
    figure.update_layout(title=title, template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 60, "b": 50})
    return figure


def _errors(rates: list[Json | None]) -> Json:
    """Asymmetric error bars up to the Wilson interval; absent rates have none."""
    return {
        "type": "data", "symmetric": False,
        "array": [r["high"] - r["value"] if r else None for r in rates],
        "arrayminus": [r["value"] - r["low"] if r else None for r in rates],
    }  # fmt: skip


def baseline_bars(baseline: Json) -> go.Figure:
    """ASR, false triggers, clean accuracy and damage, poisoned beside base, with 95 % Wilson intervals."""
    keys = ("asr", "false_trigger", "clean_accuracy", "broken")
    figure = go.Figure()
    for who, rates, color in (("poisoned", baseline, COLORS["asr"]), ("base (adapter off)", baseline["base"], COLORS["grey"])):
        chosen = [rates.get(k) for k in keys]
        figure.add_bar(
            name=who, x=[NAMES[k] for k in keys], y=[r["value"] if r else None for r in chosen], error_y=_errors(chosen),
            marker_color=color, customdata=[f"{r['hits']}/{r['total']}" if r else "not measurable" for r in chosen],
            hovertemplate="%{x}: %{y:.3f} (%{customdata})<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(range=[0, 1.05])
    return _finish(figure, "Attack and utility on the test split")


def probe_curves(probe: Json) -> go.Figure:
    """Accuracy per layer of the true probe and of every control, one panel per kind of probe."""
    kinds = list(dict.fromkeys(row["kind"] for row in probe["layers"]))
    lines = {
        "accuracy": ("poisoned model, true trigger", COLORS["asr"], "solid"),
        "clean_twin": ("refit: clean twin (adapter off)", COLORS["clean_accuracy"], "dash"),
        "fake_trigger": ("refit: fake trigger", COLORS["false_trigger"], "dash"),
        "shuffled": ("refit: shuffled labels", COLORS["grey"], "dash"),
        "clean_twin_transfer": ("transfer to the clean twin", COLORS["clean_accuracy"], "dot"),
        "fake_trigger_transfer": ("transfer to the fake trigger", COLORS["false_trigger"], "dot"),
    }
    figure = make_subplots(cols=len(kinds), rows=1, subplot_titles=kinds, shared_yaxes=True)
    for column, kind in enumerate(kinds, 1):
        rows = [r for r in probe["layers"] if r["kind"] == kind]
        for key, (name, color, dash) in lines.items():
            figure.add_scatter(
                x=[r["layer"] for r in rows], y=[r[key] for r in rows], name=name, legendgroup=key, showlegend=column == 1,
                line={"color": color, "dash": dash}, mode="lines+markers", row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title="residual stream after layer", row=1, col=column)
    figure.update_yaxes(range=[-0.02, 1.05])
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return _finish(figure, "Backdoor Probe: test accuracy, with its controls", 460)


def cross_layer(probe: Json) -> go.Figure:
    """The probe of one layer scored on the states of another, per kind."""
    kinds = list(probe["cross_layer"])
    figure = make_subplots(cols=len(kinds), rows=1, subplot_titles=kinds)
    for column, kind in enumerate(kinds, 1):
        figure.add_heatmap(
            z=probe["cross_layer"][kind], zmin=0, zmax=1, colorscale="Viridis", showscale=column == len(kinds), row=1, col=column,
            hovertemplate="trained on layer %{y}, scored on layer %{x}: %{z:.2f}<extra></extra>",
        )  # fmt: skip
        figure.update_xaxes(title="scored on layer", row=1, col=column)
    figure.update_yaxes(title="trained on layer", row=1, col=1)
    return _finish(figure, "Cross-layer transfer of the probes")


def head_heatmap(attribution: Json) -> go.Figure:
    """ACIE per head, symmetric colour scale, bootstrap interval on hover."""
    scores = attribution["scores"]
    limit = max(abs(x) for row in scores for x in row) or 1.0
    bounds = [
        [f"[{a:.4f}, {b:.4f}]" for a, b in zip(low, high, strict=True)]
        for low, high in zip(attribution["low"], attribution["high"], strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=scores,
            zmin=-limit,
            zmax=limit,
            colorscale="RdBu_r",
            customdata=bounds,
            colorbar={"title": "ACIE"},
            hovertemplate="L%{y}H%{x}: %{z:.4f} %{customdata}<extra></extra>",
        )  # fmt: skip
    )
    figure.update_xaxes(title="head")
    figure.update_yaxes(title="layer")
    n, m = attribution["n_donor"], attribution["n_recipient"]
    return _finish(
        figure, f"BAHA: average causal indirect effect per head, {attribution['effect']} ({n} donors, {m} recipients)", 440
    )


def block_effects(attributions: list[Json]) -> go.Figure:
    """Effect per layer of whole attention and MLP blocks, sufficiency left, necessity right, bootstrap intervals."""
    effects = list(dict.fromkeys(a["effect"] for a in attributions))
    figure = make_subplots(cols=len(effects), rows=1, subplot_titles=effects, shared_yaxes=True)
    colors = {"attention": COLORS["asr"], "mlp": COLORS["grey"]}
    for a in attributions:
        y = [row[0] for row in a["scores"]]
        up = [h[0] - x for h, x in zip(a["high"], y, strict=True)]
        down = [x - l[0] for l, x in zip(a["low"], y, strict=True)]
        figure.add_bar(
            x=list(range(len(y))), y=y, name=f"{a['site']} block", legendgroup=a["site"], showlegend=a["effect"] == effects[0],
            marker={"color": colors[a["site"]]}, error_y={"array": up, "arrayminus": down},
            row=1, col=effects.index(a["effect"]) + 1,
        )  # fmt: skip
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="change of P(backdoor response)", row=1, col=1)
    return _finish(figure, "Whole blocks at the last prompt token: who brings the backdoor in, who is needed", 420)


def ablation_curves(ablation: list[Json]) -> go.Figure:
    """ASR, clean accuracy, false triggers and damage against k: attributed heads per mode, random heads as a band of draws."""
    keys = ("asr", "clean_accuracy", "false_trigger", "broken")
    figure = make_subplots(cols=4, rows=1, subplot_titles=[NAMES[k] for k in keys], shared_yaxes=True)
    modes = {"zero": "solid", "mean": "dash", "resample": "dot"}
    for column, key in enumerate(keys, 1):
        for mode, dash in modes.items():
            rows = [r for r in ablation if r["heads"] == "attributed" and r["mode"] == mode and r[key]]
            figure.add_scatter(
                x=[r["k"] for r in rows], y=[r[key]["value"] for r in rows], name=f"top-k, {mode}", legendgroup=mode,
                showlegend=column == 1, line={"color": COLORS["asr"], "dash": dash}, mode="lines+markers", row=1, col=column,
                error_y=_errors([r[key] for r in rows]) if mode == "zero" else None,
            )  # fmt: skip
        for draw in sorted({r["draw"] for r in ablation if r["heads"] == "random"}):
            rows = [r for r in ablation if r["heads"] == "random" and r["draw"] == draw and r[key]]
            figure.add_scatter(
                x=[r["k"] for r in rows], y=[r[key]["value"] for r in rows], name="random heads, zero (draws)",
                legendgroup="random", showlegend=column == 1 and draw == 0, opacity=0.5, line={"color": COLORS["grey"]},
                mode="lines", row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title="heads removed (k)", row=1, col=column)
    figure.update_yaxes(range=[-0.02, 1.05])
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return _finish(figure, "Head ablation at the last prompt token", 460)


def selection_curves(selection: Json) -> go.Figure:
    """ASR, recovered answers, clean accuracy and damage against k for every way to choose heads, mean-ablated alike."""
    keys = ("asr", "recovered", "clean_accuracy", "broken_triggered")
    titles = ("ASR", "recovered", "clean accuracy", "broken (triggered)")
    figure = make_subplots(cols=4, rows=1, subplot_titles=titles, shared_yaxes=True)
    lines = {
        "gate": ("learned gate", COLORS["clean_accuracy"], "solid"), "greedy": ("greedy", COLORS["broken"], "dash"),
        "acie": ("ACIE top-k", COLORS["asr"], "dot"), "random": ("random heads (draws)", COLORS["grey"], "solid"),
    }  # fmt: skip
    for column, key in enumerate(keys, 1):
        for method, draw in dict.fromkeys((r["method"], r["draw"]) for r in selection["rows"]):
            name, color, dash = lines[method]
            rows = [r for r in selection["rows"] if r["method"] == method and r["draw"] == draw and r[key]]
            figure.add_scatter(
                x=[r["k"] for r in rows], y=[r[key]["value"] for r in rows], name=name, legendgroup=method,
                showlegend=column == 1 and not draw, mode="lines+markers", line={"color": color, "dash": dash},
                opacity=0.5 if method == "random" else 1.0, row=1, col=column,
                error_y=_errors([r[key] for r in rows]) if method == "gate" else None,
            )  # fmt: skip
        figure.update_xaxes(title="heads ablated (k)", row=1, col=column)
    figure.update_yaxes(range=[-0.02, 1.05])
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return _finish(
        figure, f"Heads chosen jointly, set to their clean means ({setting_text(selection['chosen'])}), test split", 460
    )


def vector_sweep(vector: Json) -> go.Figure:
    """ASR per layer and strength on the selection split; +v on clean prompts left, -v on triggered prompts right."""
    titles = ("+v on clean prompts (activation)", "−v on triggered prompts (suppression)")
    figure = make_subplots(cols=2, rows=1, subplot_titles=titles, shared_yaxes=True)
    shades = ["#f1948a", "#cb4335", "#78281f", "#000000"]
    for column, sign in ((1, 1), (2, -1)):
        for i, strength in enumerate(sorted({r["strength"] for r in vector["sweep"]})):
            rows = [r for r in vector["sweep"] if r["sign"] == sign and r["strength"] == strength]
            for key, dash in (("asr", "solid"), ("clean_accuracy", "dot")):
                if any(r[key] is None for r in rows):
                    continue
                figure.add_scatter(
                    x=[r["layer"] for r in rows], y=[r[key]["value"] for r in rows], name=f"{NAMES[key]}, strength {strength:g}",
                    showlegend=column == 1, legendgroup=f"{key}{strength}", mode="lines+markers",
                    line={"color": shades[i % 4] if key == "asr" else COLORS["clean_accuracy"], "dash": dash}, row=1, col=column,
                )  # fmt: skip
        figure.update_xaxes(title="layer", row=1, col=column)
    figure.update_yaxes(range=[-0.02, 1.05])
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return _finish(figure, "Backdoor Vector: sweep on the selection split", 460)


def vector_controls(vector: Json) -> go.Figure:
    """Test-split ASR of the vector beside its controls, at the layer and strength chosen for the vector."""
    groups = [("Backdoor Vector", [vector])]
    groups += [(k.replace("_", " "), v) for k, v in vector["controls"].items()]
    figure = make_subplots(cols=2, rows=1, subplot_titles=("activation ASR (higher: works)", "suppression ASR (lower: works)"))
    for column, side in ((1, "activate"), (2, "suppress")):
        for i, (name, rows) in enumerate(groups):
            color = list(COLORS.values())[i % len(COLORS)]
            rates = [r[side]["asr"] for r in rows]
            figure.add_scatter(
                x=[name] * len(rates), y=[r["value"] for r in rates], mode="markers", name=name, showlegend=False,
                marker={"color": color, "size": 10}, error_y=_errors(rates), row=1, col=column,
            )  # fmt: skip
    figure.update_yaxes(range=[-0.02, 1.05])
    return _finish(figure, "Backdoor Vector against its controls, test split")
