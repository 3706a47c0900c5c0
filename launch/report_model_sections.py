"""The sections of a report about models against each other: quality of each, the conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.report_html import Cell, figure, missing, number, paragraph, percent, table
from launch.report_inputs import ReportInputs, Row, is_number
from launch.report_spike_figures import half_lives, layer_errors

VARIANTS = {
    "base": "Transformer, as trained",
    "control": "the Transformer, trained on",
    "scratch": "hybrid from random weights",
    "converted": "hybrid, freshly converted",
    "continued": "hybrid, trained on, spikes off",
    "spiked": "hybrid, trained on, spikes on",
}
MOE_VARIANTS = {
    "moe_converted": "branches and experts, freshly converted",
    "moe_continued": "branches and experts, trained on, spikes off",
    "moe_spiked": "branches and experts, trained on, spikes on",
}


def comparison(inputs: ReportInputs) -> str:
    """Base, control, scratch, converted, continued and spiked on the same held-out rows."""
    perplexity = inputs.summary.get("perplexity")
    if not isinstance(perplexity, Mapping) or not perplexity:
        why = inputs.problems.get("summary", "summary.json has no perplexities.")
        return missing("No comparison of models:", why, "`make quickstart` writes it.")
    beyond = inputs.summary.get("perplexity_beyond_window") or {}
    rows: list[Sequence[Cell]] = []
    for name in [*VARIANTS, *(other for other in perplexity if other not in VARIANTS)]:
        value = perplexity.get(name)
        rows.append(
            (
                name, {**VARIANTS, **MOE_VARIANTS}.get(name, ""), _fixed(value, 2),
                _ratio(value, perplexity.get("base")), _ratio(value, perplexity.get("control")),
                _fixed(beyond.get(name), 2), _ratio(beyond.get(name), beyond.get("control")),
            )
        )  # fmt: skip
    headers = ["model", "", "perplexity", "÷ base", "÷ control", "beyond window", "its ÷ control"]
    return table(headers, rows) + paragraph(
        "Perplexity on the same held-out rows; lower is better. The control is the Transformer "
        "itself, trained on the same samples as the converted model: it shows what the extra "
        "training gives by itself. Beyond window: only tokens with more context than a "
        "sliding-window layer sees."
    )


def certificate(inputs: ReportInputs) -> str:
    """Where the converted tensors come from and what the conversion changed."""
    data = inputs.certificate
    if not data:
        return missing(
            "No certificate:", inputs.problems.get("certificate", "certificate.json is empty."),
            "`python -m launch.convert source=HF_DIR out=DIR` writes it; name that folder with "
            "`certificate=DIR`.",
        )  # fmt: skip
    source, target = data.get("source") or {}, data.get("target") or {}
    rows: list[Sequence[Cell]] = [
        *((kind, count) for kind, count in (data.get("origins") or {}).items()),
        ("unexplained", len(data.get("unexplained_tensors") or [])),
        ("of the source, unused", len(source.get("unused_tensors") or [])),
    ]
    origin = paragraph(
        f"From {source.get('format', '?')} with {source.get('pattern', '?')} to "
        f"{target.get('pattern', '?')}. Every target tensor has an origin:"
    )
    return (
        origin
        + table(["tensors", "number"], rows)
        + _alignment(data)
        + _numeric(data.get("numeric") or {})
    )


def _alignment(data: Row) -> str:
    rows = [
        (entry.get("layer"), entry.get("before"), entry.get("after"), entry.get("tokens"))
        for entry in data.get("alignment") or []
    ]
    headers = ["layer", "error before", "error after", "tokens"]
    caption = "Attention transfer: relative output error of each aligned layer"
    return table(headers, rows, caption=caption, digits=3) if rows else ""


def _numeric(numeric: Row) -> str:
    layers, linear = numeric.get("layers") or [], numeric.get("linear_layers") or []
    if not layers:
        return missing(
            "No numeric comparison of source and target:", "it was skipped.",
            "Convert with `certificate.numeric=true` and a `text=` to have it.",
        )  # fmt: skip
    perplexity = numeric.get("perplexity") or {}
    parts = [
        paragraph(
            f"On {number(numeric.get('tokens'))} tokens of sample text the conversion takes the "
            f"perplexity from {number(perplexity.get('source'))} to "
            f"{number(perplexity.get('target'))}; KL divergence of the predictions "
            f"{number(numeric.get('logit_kl'), 3)} nats a token."
        ),
        figure(layer_errors(layers), "Blue: gated linear, orange: sliding window, green: full."),
    ]
    if linear:
        rows = [
            (
                entry.get("layer"), entry.get("key_bias_norm"), entry.get("key_projection_norm"),
                percent(entry.get("dead_key_channels")),
            )
            for entry in linear
        ]  # fmt: skip
        headers = ["linear layer", "norm of key bias", "mean norm of W_k x", "dead key channels"]
        parts += [
            table(headers, rows, digits=3),
            figure(half_lives(linear), "Over the same sample text."),
        ]
    return "\n".join(parts)


def _fixed(value: Any, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if is_number(value) else number(value)


def _ratio(value: Any, reference: Any) -> str:
    if not (is_number(value) and is_number(reference)) or not reference:
        return "–"
    return _fixed(float(value) / float(reference), 3)
