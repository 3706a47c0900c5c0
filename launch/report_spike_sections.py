"""The sections of a report about spikes: statistics of each layer, the raster, the energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch import report_figures as draw
from launch.report_html import Cell, escape, figure, missing, number, paragraph, percent, table
from launch.report_inputs import ReportInputs, Row, by_site, is_number, series, site_mean
from launch.report_spike_figures import MAX_TOKENS, SITES, layer_panels, raster, visible
from models.spiking.energy import CAVEATS, FP16_MAC_PJ, INT8_ADD_PJ, INT8_MAC_PJ, estimate
from models.spiking.recorder import METRICS

SPIKE = "Train with `spiking=adaptive`; statistics come every `spiking.statistics_interval_steps`."

DEFINITIONS: dict[str, tuple[str, str, str]] = {
    "window_sparsity": (
        "window sparsity",
        "share of all-zero windows of 3 steps, each count expanded over three windows (9 steps)",
        "69.15 %",
    ),
    "firing_rate": ("per-step firing rate", "share of those 9 steps that carry a spike", "–"),
    "silent_share": ("silent channels", "share of values whose count is 0", "18.4 %"),
    "share_le_7": ("counts of at most 7", "share of values that fit in one window", "94.1 %"),
    "clipped_share": ("clipped", "share of counts cut by max_count", "not clipped"),
}
"""Metric, words, definition, and what the SpikingBrain report measured on its 7B."""


def sparsity(inputs: ReportInputs) -> str:
    """Firing rate and sparsity of each layer, the definitions, and how they moved."""
    rows = inputs.spike_rows()
    if not rows:
        why = inputs.problems.get("metrics", "no step recorded any.")
        return missing("No spike statistics:", why, SPIKE) + _evaluated(inputs.summary)
    last = rows[-1]
    panels = {
        "firing_rate": "Firing rate, per step",
        "window_sparsity": "Window sparsity",
        "silent_share": "Silent channels",
    }
    return "\n".join(
        (
            _definitions(last),
            figure(layer_panels(last, panels), f"At step {number(last['step'])}."),
            _over_time(rows),
            _evaluated(inputs.summary),
        )
    )


def spike_raster(inputs: ReportInputs) -> str:
    """One sentence as spikes over virtual time."""
    data = inputs.raster
    if data is None:
        return missing(
            "No spike raster:", inputs.problems.get("raster", ""),
            "`python -m launch.report run_dir=DIR` draws one where DIR has a checkpoint of a "
            "spiking run.",
        )  # fmt: skip
    tokens = "".join(
        f"<span>{escape(visible(token))}<sub>{index + 1}</sub></span>"
        for index, token in enumerate(data.tokens[:MAX_TOKENS])
    )
    layer, _, site = data.site.partition("/")
    where = f"Layer {layer}, {SITES[site][0]}. " if site in SITES else ""
    caption = (
        f"{where}Each count is expanded bit by bit, most significant first: a spike at a step "
        f"adds (blue) or takes away (orange) that step's weight, and their sum is the count "
        f"exactly. White is silence."
    )
    return f'<p class="sentence">{tokens}</p>' + figure(raster(data), caption)


def energy(inputs: ReportInputs) -> str:
    """The report's arithmetic-energy formula with this run's spikes."""
    rows = inputs.spike_rows()
    mean_spikes = site_mean(rows[-1], "mean_spikes") if rows else None
    if mean_spikes is None:
        return missing("No energy estimate:", "it needs spike statistics.", SPIKE)
    result = estimate(mean_spikes)
    table_rows: list[Sequence[Cell]] = [
        ("spiking: mean spikes × INT8 addition", result.spiking_pj, "", ""),
        ("INT8 multiply-accumulate", INT8_MAC_PJ, percent(result.saved_versus_int8),
         f"{INT8_MAC_PJ / result.spiking_pj:.1f} ×" if result.spiking_pj else "–"),
        ("FP16 multiply-accumulate", FP16_MAC_PJ, percent(result.saved_versus_fp16),
         f"{FP16_MAC_PJ / result.spiking_pj:.1f} ×" if result.spiking_pj else "–"),
    ]  # fmt: skip
    caveats = "".join(f"<li>{escape(caveat)}</li>" for caveat in CAVEATS)
    return (
        paragraph(
            f"The SpikingBrain report's formula, not a measurement: a projection input emits "
            f"{number(mean_spikes, 3)} spikes on average (mean over layers and sites at step "
            f"{number(rows[-1]['step'])}), and each spike costs one INT8 addition of {INT8_ADD_PJ} "
            f"pJ per weight: {number(mean_spikes, 3)} × {INT8_ADD_PJ} pJ = "
            f"{number(result.spiking_pj, 3)} pJ."
        )
        + table(["operation", "pJ", "saved by spiking", "ratio"], table_rows, digits=3)
        + f"<p>What it leaves out:</p><ul>{caveats}</ul>"
    )


def every_site(inputs: ReportInputs) -> str:
    """All spike metrics of all sites at the last recorded step."""
    rows = inputs.spike_rows()
    if not rows:
        return missing("No spike statistics:", "no step recorded any.", SPIKE)
    values = {metric: by_site(rows[-1], metric) for metric in METRICS}
    places = sorted(
        {(layer, site) for sites in values.values() for site, layers in sites.items()
         for layer in layers},
        key=lambda place: (place[0], list(SITES).index(place[1]) if place[1] in SITES else 99),
    )  # fmt: skip
    table_rows = [
        (
            f"{layer} {site}",
            *(values[metric].get(site, {}).get(layer) for metric in METRICS),
        )
        for layer, site in places
    ]
    headers = ["layer, site", *(_words(metric) for metric in METRICS)]
    return table(headers, table_rows, digits=3)


def _definitions(row: Row) -> str:
    rows = [
        (words, meaning, percent(site_mean(row, metric), 2), published)
        for metric, (words, meaning, published) in DEFINITIONS.items()
    ]
    means = (
        ("mean_spikes", "mean spikes", "spikes (set bits) that a value emits", "1.13"),
        ("mean_count", "mean count", "mean absolute count of a value", "–"),
    )
    for metric, words, meaning, published in means:
        rows.append((words, meaning, number(site_mean(row, metric), 3), published))
    headers = ["statistic", "definition", "this run", "published 7B"]
    caption = "Mean over layers and sites. Sparsity has three definitions; compare like with like."
    return table(headers, rows, caption=caption)


def _over_time(rows: list[Row]) -> str:
    """Mean firing rate of each site over training; nothing when recorded once."""
    if len(rows) < 2:
        return ""
    lines = []
    for site, (label, color, _) in SITES.items():
        means = [
            {"step": row["step"], "value": sum(layers.values()) / len(layers)}
            for row in rows
            if (layers := by_site(row, "firing_rate").get(site))
        ]
        steps, values = series(means, "value")
        if len(steps):
            lines.append(draw.Line(steps, values, label, color, is_markers=len(steps) < 60))
    axis = draw.Axis("Firing rate during training", "share of time steps", is_share=True)
    return figure(draw.curves(lines, axis, height=2.8), "Mean over layers.") if lines else ""


def _evaluated(summary: Row) -> str:
    """What evaluation measured on held-out text, when a summary has it."""
    found = summary.get("sparsity")
    if not isinstance(found, Mapping):
        return ""
    rows = [
        (_words(str(k)), number(v, 3) if str(k).startswith("mean") else percent(v, 2))
        for k, v in found.items()
        if is_number(v)
    ]
    caption = "Evaluation of the spiked model (summary.json), every value counted once."
    return table(["held-out text", "value"], rows, caption=caption) if rows else ""


def _words(metric: str) -> str:
    return metric.replace("_le_", " ≤ ").replace("_", " ")
