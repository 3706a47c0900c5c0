"""An exported gla_swa folder, computed by the public format's rules, gives our model's logits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.conversion.config_keys import Format
from models.conversion.export import export_folder
from models.model import Model
from models.sequence import SequenceContext
from tests.models.conversion.test_export import HYBRID, random_entries
from tests.support.closeness import assert_close

TOKENS = 21


def public_forward(folder: Path, tokens: Tensor) -> Tensor:
    """Token by token, from the names and keys of the public format alone (spec 1.2 to 1.4)."""
    keys = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "model.safetensors")
    x = w["model.embeddings.weight"][tokens]
    for layer in range(keys["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        mix = _softmax if layer in keys["attn_layers"] else _linear
        h = _norm(x, w[p + "attn_norm.weight"], keys["norm_eps"])
        x = x + mix(h, w, p + "attn.", keys) @ w[p + "attn.o_proj.weight"].T
        h = _norm(x, w[p + "mlp_norm.weight"], keys["norm_eps"])
        gate = F.silu(h @ w[p + "mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return _norm(x, w["model.norm.weight"], keys["norm_eps"]) @ w["lm_head.weight"].T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _heads(h: Tensor, w: dict[str, Tensor], name: str, count: int) -> Tensor:
    return (h @ w[name + ".weight"].T + w[name + ".bias"]).view(len(h), count, -1)


def _linear(h: Tensor, w: dict[str, Tensor], p: str, keys: dict[str, Any]) -> Tensor:
    queries, groups = keys["num_attention_heads"], keys["num_key_value_heads"]
    q = _heads(h, w, p + "q_proj", queries).relu()
    k, v = _heads(h, w, p + "k_proj", groups).relu(), _heads(h, w, p + "v_proj", groups)
    low = h @ w[p + "gk_proj.0.weight"].T
    logits = low @ w[p + "gk_proj.1.weight"].T + w[p + "gk_proj.1.bias"]
    decay = torch.sigmoid(logits) ** (1 / keys["gate_logit_normalizer"])
    decay = decay.view(len(h), groups, -1)
    share = queries // groups
    k, v, decay = (t.repeat_interleave(share, dim=1) for t in (k, v, decay))
    size = q.shape[-1]
    out, state = [], torch.zeros(queries, size, size, dtype=h.dtype)
    for t in range(len(h)):
        state = decay[t][:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
        out.append(size**-0.5 * torch.einsum("nk,nkv->nv", q[t], state))
    heads = _norm(torch.stack(out), w[p + "g_norm.weight"], keys["norm_eps"])
    return heads.flatten(1)


def _softmax(h: Tensor, w: dict[str, Tensor], p: str, keys: dict[str, Any]) -> Tensor:
    queries, groups = keys["num_attention_heads"], keys["num_key_value_heads"]
    q, k = _heads(h, w, p + "q_proj", queries), _heads(h, w, p + "k_proj", groups)
    v = _heads(h, w, p + "v_proj", groups).repeat_interleave(queries // groups, dim=1)
    size = q.shape[-1]
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    angles = torch.arange(len(h), dtype=torch.float64)[:, None] * keys["rope_theta"] ** -exponents
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    q, k = rotate(q), rotate(k).repeat_interleave(queries // groups, dim=1)
    out = []
    for t in range(len(h)):
        # The public code looks back over `sliding_window` earlier keys, besides the current one.
        seen = slice(max(0, t - keys["sliding_window"]), t + 1)
        scores = torch.einsum("nd,snd->ns", q[t], k[seen]) * size**-0.5
        out.append(torch.einsum("ns,snd->nd", scores.softmax(-1), v[seen]))
    return torch.stack(out).flatten(1)


@pytest.mark.parametrize(("window", "includes_self"), [(8, True), (8, False), (64, True)])
def test_logits_by_the_public_rules(window: int, includes_self: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(
        HYBRID, mixers="L S S L S", ffns="d*5", window_tokens=window,
        window_includes_self=includes_self,
    )  # fmt: skip
    entries = random_entries(config, torch.float64)
    for index, entry in enumerate(entries):
        value = entry.load() * (1.0 if len(entry.shape) == 1 else 0.25)
        entries[index] = dataclasses.replace(entry, load=lambda value=value: value)
    export_folder(entries, config, tmp_path / "out", format=Format.gla_swa)
    model = Model(config)
    model.load_state_dict({entry.name: entry.load() for entry in entries}, assign=True)
    tokens = torch.randint(0, 61, (TOKENS,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model(tokens[None], SequenceContext.one_document_per_row(1, TOKENS))[0]
    assert_close(ours, public_forward(tmp_path / "out", tokens), relative=1e-9)
