"""Figures about layers: spike statistics, the spike raster, conversion error, half-lives."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import from_numpy

from launch.report_figures import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    figure,
    image,
    share_limits,
)
from launch.report_inputs import Raster, Row, by_site
from models.spiking.codes import SpikeCode, expand

SITES = {
    "mixer_in": ("mixer input (q, k, v, gate)", BLUE, "o"),
    "mixer_out": ("mixer output (o)", ORANGE, "s"),
    "mixer_out_linear": ("L branch output (o)", ORANGE, "<"),
    "mixer_out_sliding_window": ("S branch output (o)", INK, ">"),
    "mixer_out_full": ("F branch output (o)", FAINT, "v"),
    "ffn_in": ("FFN input (gate, up)", GREEN, "^"),
    "ffn_out": ("FFN output (down)", PURPLE, "D"),
    "expert_out": ("expert output (down)", INK, "v"),
}
"""Where spikes are, in the order of a block: words, colour, marker."""

MAX_TOKENS = 14
MAX_CHANNELS = 48
KIND_COLORS = {"L": BLUE, "S": ORANGE, "F": GREEN}


def layer_panels(row: Row, panels: dict[str, str]) -> str:
    """One panel a metric over layers, one curve a site; `panels` maps metrics to titles."""
    with figure(9.2, 3.0) as drawn:
        axes = np.atleast_1d(drawn.subplots(1, len(panels)))
        for ax, (metric, title) in zip(axes, panels.items(), strict=True):
            sites = by_site(row, metric)
            for site, layers in sites.items():
                label, color, marker = SITES.get(site, (site, INK, "x"))
                ax.plot(
                    list(layers), list(layers.values()), color=color, marker=marker,
                    markersize=4.5, linewidth=1.2, label=label,
                )  # fmt: skip
            ax.set_title(title)
            ax.set_xlabel("layer")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            ax.set_ylim(*share_limits([v for layers in sites.values() for v in layers.values()]))
        axes[0].set_ylabel("share")
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4)
        return image(drawn, "Spike statistics of each layer: " + ", ".join(panels.values()))


def raster(data: Raster) -> str:
    """The sentence as spikes: every count expanded over its bits, most significant first."""
    counts = data.counts[:MAX_TOKENS]
    channels = np.linspace(0, counts.shape[1] - 1, min(MAX_CHANNELS, counts.shape[1])).astype(int)
    train = expand(
        from_numpy(np.ascontiguousarray(counts[:, channels])), SpikeCode.bitwise_bidirectional
    )
    num_steps, num_tokens, num_channels = train.planes.shape
    grid = train.planes.permute(2, 1, 0).reshape(num_channels, -1).numpy()
    with figure(9.2, 4.3) as drawn:
        ax = drawn.subplots()
        ax.grid(visible=False)
        colors = ListedColormap([ORANGE, "#ffffff", BLUE])
        ax.imshow(grid, aspect="auto", cmap=colors, vmin=-1, vmax=1, interpolation="none")
        for boundary in range(1, num_tokens):
            ax.axvline(boundary * num_steps - 0.5, color="#c3cad1", linewidth=0.8)
        ax.set_xticks((np.arange(num_tokens) + 0.5) * num_steps - 0.5)
        ax.set_xticklabels(
            [_token_label(n, token) for n, token in enumerate(data.tokens[:num_tokens])],
            rotation=45, ha="right", rotation_mode="anchor",
        )  # fmt: skip
        ax.set_yticks([0, num_channels - 1], labels=[str(channels[0]), str(channels[-1])])
        ax.set_xlabel(f"token, {num_steps} time steps each (weights {_weights(num_steps)})")
        ax.set_ylabel(f"channel ({num_channels} of {data.counts.shape[1]})")
        drawn.legend(
            handles=[Patch(color=BLUE, label="spike +1"), Patch(color=ORANGE, label="spike −1")],
            loc="outside upper right", ncols=2,
        )  # fmt: skip
        return image(drawn, f"Spike raster of {num_tokens} tokens over {num_channels} channels")


def layer_errors(layers: list[Row]) -> str:
    """Relative hidden-state error after each layer, coloured by the layer's new mixer."""
    numbers = [int(layer["layer"]) for layer in layers]
    kinds = [str(layer.get("target", "")) for layer in layers]
    with figure(9.2, 2.6) as drawn:
        ax = drawn.subplots()
        ax.grid(visible=False, axis="x")
        colors = [KIND_COLORS.get(kind, INK) for kind in kinds]
        ax.bar(numbers, [float(layer["relative_error"]) for layer in layers], 0.6, color=colors)
        ax.set_xticks(numbers, [f"{kind}\n{n}" for kind, n in zip(kinds, numbers, strict=True)])
        ax.set_xlabel("layer, with its mixer after conversion")
        ax.set_ylabel("relative error (RMS)")
        ax.set_title("Hidden states after each layer, converted against source")
        return image(drawn, "Relative error of the hidden states after each layer")


def half_lives(layers: list[Row]) -> str:
    """How long each gated linear layer remembers: share of decays per range of half-lives."""
    edges = layers[0]["half_life_tokens"]["edges"]
    shares = np.array([layer["half_life_tokens"]["share"] for layer in layers], dtype=np.float64)
    names = [f"< {edges[0]:g}", *(f"{a:g}-{b:g}" for a, b in _pairs(edges)), f"≥ {edges[-1]:g}"]
    with figure(9.2, 1.5 + 0.28 * len(layers)) as drawn:
        ax = drawn.subplots()
        ax.grid(visible=False)
        shown = ax.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=max(shares.max(), 0.01))
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_yticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
        ax.set_xlabel("half-life of a key channel's decay, tokens")
        ax.set_ylabel("layer")
        ax.set_title("Memory of the gated linear layers")
        bar = drawn.colorbar(shown, ax=ax, format=PercentFormatter(1.0, decimals=0), pad=0.01)
        bar.set_label("share")
        return image(drawn, "Histogram of decay half-lives per linear layer")


def visible(token: str) -> str:
    """A token's text with line breaks and tabs as signs."""
    return token.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")


def _pairs(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values, values[1:], strict=False))


def _token_label(index: int, token: str) -> str:
    """Number and text; only the number where the figure's font may lack the characters."""
    text = visible(token).strip() or "space"
    is_safe = all(32 <= ord(c) < 256 or c in "↵⇥" for c in text)
    return f"{text[:14]} {index + 1}".replace("$", r"\$") if is_safe else str(index + 1)


def _weights(num_steps: int) -> str:
    """`8, 4, 2, 1`."""
    return ", ".join(str(2**bit) for bit in range(num_steps - 1, -1, -1))
