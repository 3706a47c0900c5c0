"""The sections of a report about training: key figures, what ran, curves.

Each function turns the inputs into the HTML of one section; what is missing becomes a sentence
with the command that makes it. Spikes are in `report_spike_sections`, models against each other
in `report_model_sections`.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from pydantic import TypeAdapter

from launch import report_figures as draw
from launch.report_html import figure, missing, number, paragraph, percent, table, tiles
from launch.report_inputs import ReportInputs, is_number, series, site_mean
from models.config import ModelConfig
from models.cost import parameter_count
from models.spiking.energy import estimate

TRAIN = "`python -m launch.train experiment=NAME run_dir=DIR` writes it."


def overview(inputs: ReportInputs) -> str:
    """The key figures at the top of the page."""
    items = []
    _, losses = inputs.series("loss")
    if len(losses):
        items.append((f"{losses[-10:].mean():.3f}", "training loss, nats a token, last 10 steps"))
    _, perplexities = series(inputs.evaluations, "perplexity")
    if len(perplexities):
        items.append((number(float(perplexities[-1])), "held-out perplexity, last evaluation"))
    if inputs.metrics and is_number(inputs.metrics[-1].get("tokens")):
        items.append((f"{inputs.metrics[-1]['tokens']:,}", "tokens seen"))
    _, rates = inputs.series("tokens_per_second")
    if len(rates):
        items.append((f"{median(rates):,.0f}", "tokens a second, median step"))
    if spiking := inputs.spike_rows():
        items.append((percent(site_mean(spiking[-1], "window_sparsity")), "spike window sparsity"))
        if mean_spikes := site_mean(spiking[-1], "mean_spikes"):
            ratio = 1 / (1 - estimate(mean_spikes).saved_versus_fp16)
            items.append((f"{ratio:.0f} ×", "less arithmetic energy than FP16 (estimate)"))
    return tiles(items)


def what_ran(inputs: ReportInputs) -> str:
    """Configuration in words, and the time of each part when there is a summary."""
    parts = []
    if inputs.config:
        parts.append(table(["setting", "value"], list(_settings(inputs).items())))
    else:
        parts.append(missing("No configuration:", inputs.problems.get("config", ""), TRAIN))
    seconds = inputs.summary.get("seconds")
    if isinstance(seconds, Mapping) and seconds:
        rows = [
            (str(part).replace("_", " "), f"{value:,.1f}")
            for part, value in seconds.items()
            if is_number(value)
        ]
        parts.append(table(["part", "seconds"], rows, caption="Time of each part"))
    return "\n".join(parts)


def loss(inputs: ReportInputs) -> str:
    """Training loss with held-out points."""
    steps, losses = inputs.series("loss")
    if not len(losses):
        return missing("No training steps:", inputs.problems.get("metrics", ""), TRAIN)
    lines = [draw.Line(steps, losses, "training", is_noisy=True)]
    held_steps, held = series(inputs.evaluations, "loss")
    words = (
        "The pale line is each step, the strong one a moving average; the first steps may lie "
        "above the panel."
    )
    if len(held):
        lines.append(draw.Line(held_steps, held, "held-out", draw.ORANGE, is_markers=True))
        remark = ""
    else:
        remark = missing(
            "No held-out loss:", inputs.problems.get("evaluations", "eval.jsonl is empty."),
            "Train with `evaluation.interval_steps=N` to have it.",
        )  # fmt: skip
    axis = draw.Axis("Training and held-out loss", "nats a token", _marks(inputs), cuts_start=True)
    return figure(draw.curves(lines, axis), f"Next-token loss. {words}") + remark


def learning_rate(inputs: ReportInputs) -> str:
    """Learning rate and gradient norm, side by side."""
    return _panels(
        inputs,
        {
            "lr": draw.Axis("Learning rate", "learning rate", has_zero=True),
            "grad_norm": draw.Axis("Gradient norm", "norm before clipping", has_zero=True),
        },
    )


def throughput(inputs: ReportInputs) -> str:
    """Tokens a second, and utilisation where the device's peak is known."""
    _, mfu = inputs.series("mfu")
    panels = {
        "tokens_per_second": draw.Axis("Tokens per second, all ranks", "tokens / s", has_zero=True)
    }
    if len(mfu):
        panels["mfu"] = draw.Axis(
            "Model FLOPs utilisation", "share of peak", has_zero=True, is_share=True
        )
        remark = paragraph(
            f"Median model FLOPs utilisation {percent(median(mfu))}, with the keys that were "
            f"really visible in packed documents; recomputation and spike encoding are not counted."
        )
    else:
        remark = paragraph("No utilisation: the peak FLOP/s of this device is not known.")
    return _panels(inputs, panels) + (remark if inputs.metrics else "")


def _panels(inputs: ReportInputs, panels: Mapping[str, draw.Axis]) -> str:
    """Small curves side by side, one a metric; those without values are left out."""
    found = {key: inputs.series(key) for key in panels if len(inputs.series(key)[0])}
    if not found:
        return missing("No training steps:", inputs.problems.get("metrics", ""), TRAIN)
    drawn = [
        draw.curves(
            [draw.Line(steps, values, is_noisy=key != "lr")],
            panels[key],
            width=9.2 if len(found) == 1 else 4.5,
            height=2.4,
        )
        for key, (steps, values) in found.items()
    ]
    kind = "alone" if len(found) == 1 else "pair"
    return f'<div class="{kind}">' + "".join(f"<figure>{d}</figure>" for d in drawn) + "</div>"


def _marks(inputs: ReportInputs) -> dict[str, float]:
    """Where stages begin and spiking is switched on."""
    marks: dict[str, float] = {}
    previous = None
    for row in inputs.metrics:
        if previous not in (None, row.get("stage")):
            marks[str(row.get("stage"))] = row["step"]
        previous = row.get("stage")
    start = inputs.setting("spiking.start_step")
    last = inputs.metrics[-1]["step"]
    if _spikes(inputs) and is_number(start) and 0 < start < last:
        marks["spikes on"] = start + 1
    return marks


def _spikes(inputs: ReportInputs) -> bool:
    # A bare `off` in YAML is the boolean False.
    return inputs.setting("spiking.neuron") not in (None, "off", False)


def _settings(inputs: ReportInputs) -> dict[str, str]:
    """The facts of `config.yaml` that a reader asks for first; absent ones are left out."""
    get = inputs.setting
    found: dict[str, Any] = {
        "experiment": get("experiment"),
        "layers": f"{get('model.mixers')}, FFN {get('model.ffns')}",
        "size": _size(get("model")),
        "window": f"{get('model.window_tokens')} tokens" if get("model.window_tokens") else None,
        "spiking": _spiking_words(inputs),
        "stages": _stage_words(get("stages")),
        "start": get("init.checkpoint") or "random weights",
        "data": get("data.path"),
        "precision": get("training.precision"),
        "backend": get("backend"),
        "seed": get("seed"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _size(model: Any) -> str | None:
    if not isinstance(model, Mapping):
        return None
    try:
        config = TypeAdapter(ModelConfig).validate_python(dict(model))
    except ValueError:  # a folder of another version: say less
        return None
    return (
        f"{parameter_count(config):,} parameters, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads and {config.num_key_value_heads} key-value heads of "
        f"{config.head_dim}, vocabulary {config.vocab_size:,}"
    )


def _spiking_words(inputs: ReportInputs) -> str:
    if not _spikes(inputs):
        return "off"
    start = inputs.setting("spiking.start_step") or 0
    return (
        f"{inputs.setting('spiking.neuron')}, k = {inputs.setting('spiking.k')}, from step {start}"
    )


def _stage_words(stages: Any) -> str | None:
    if not isinstance(stages, Mapping):
        return None
    return "; ".join(
        f"{name}: {stage.get('steps')} steps of {number(stage.get('global_batch_tokens'))} tokens, "
        f"rows of {number(stage.get('sequence_length'))}, lr {stage.get('lr')}"
        for name, stage in stages.items()
        if isinstance(stage, Mapping)
    )
