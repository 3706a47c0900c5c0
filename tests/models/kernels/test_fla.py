"""FLA's kernels through our signature, in a process of their own under the Triton interpreter.

The interpreter has no GPU's precision or speed; it checks the pinned library's names, layouts and
conventions on every machine. `tests/models/kernels/test_gpu.py` has the kernels themselves.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.kernels import fla
from models.kernels.fallback import warn_once
from tests.models.kernels.cases import (
    assert_results,
    document_state,
    documents,
    linear_operands,
    linear_results,
    recurrence,
)

ROOT = Path(__file__).resolve().parents[3]

# Triton 3.9's interpreter wants a driver to time configurations with, and knows no methods of a
# Python integer that counts a loop: give it one configuration, and make loop counters tensors.
INTERPRETER = """
import ast, sys
import triton.runtime.autotuner as autotuner
import triton.runtime.interpreter as interpreter

prune = autotuner.Autotuner.prune_configs
autotuner.Autotuner.prune_configs = lambda self, arguments: prune(self, arguments)[:1]

def visit_For(self, node):
    self.generic_visit(node)
    named = isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Call)
    if named and getattr(node.iter.func, "id", "") == "range":
        name = node.target.id
        node.body = [self.visit_Assign(ast.parse(f"{name} = {name}").body[0]), *node.body]
    return node

interpreter.ASTTransformer.visit_For = visit_For
"""

CASES = """
import json
import torch
from models.kernels import chunked, fla
from tests.models.kernels.cases import (
    document_state, documents, double, linear_operands, linear_results, worst,
)

used = []
import fla.ops.gla as library
for name in ("chunk_gla", "fused_recurrent_gla"):
    def spy(*args, _call=getattr(library, name), _name=name, **kwargs):
        used.append(_name)
        return _call(*args, **kwargs)
    setattr(library, name, spy)

from models.kernels.fla import linear_attention

cases = {
    "chunk, one document": (1, 75, None),
    "chunk, packed": (2, 70, [[45, 1, 24], [70]]),
    "recurrent, one document": (2, 3, None),
    "recurrent, packed": (2, 12, [[4, 8], [11, 1]]),
}
errors = {}
for name, (rows, tokens, lengths) in cases.items():
    operands = linear_operands(rows, tokens, dim=16, dtype=torch.float32)
    if lengths is not None:
        operands.append(document_state(operands))
    sequence = None if lengths is None else documents(lengths)
    expected = linear_results(chunked.linear_attention, double(operands), sequence)
    used.clear()
    actual = linear_results(linear_attention, operands, sequence)
    errors[name] = worst(actual, expected) | {"kernels": sorted(set(used))}

from models.kernel_memory import Heads, linear_memory

# What autograd keeps beside the operands, and what the planner says.
operands = linear_operands(2, 75, dim=16, dtype=torch.float32)[:4]
q, k, v, log_decay = (x.detach().requires_grad_() * 1.0 for x in operands)
kept = {}
def keep(x):
    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x
with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
    out = linear_attention(q, k, v, log_decay, scale=1.0, sequence=None)[0]
own = {x.untyped_storage().data_ptr() for x in (q, k, v, log_decay, out)}
heads = Heads(2, 75, num_queries=q.shape[2], num_keys=k.shape[2], dim=16, narrow=4, wide=4)
errors["kept"] = {
    "aside": sum(size for address, size in kept.items() if address not in own),
    "planned": linear_memory("fla", heads).aside,
    "keeps q alone": [x.untyped_storage().data_ptr() in kept for x in (q, k, v, log_decay, out)],
}
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    pytest.importorskip("triton")
    pytest.importorskip("fla")
    script = tmp_path_factory.mktemp("fla") / "cases.py"
    script.write_text(INTERPRETER + CASES)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(script.parent / "cache"),
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ("chunk, one document", "chunk_gla"),
        ("chunk, packed", "chunk_gla"),
        ("recurrent, one document", "fused_recurrent_gla"),
        ("recurrent, packed", "fused_recurrent_gla"),
    ],
)
def test_the_library_computes_our_recurrence(
    case: str, kernel: str, interpreted: dict[str, dict[str, object]]
) -> None:
    result = interpreted[case]
    assert result.pop("kernels") == [kernel]
    assert set(result) == {
        "out", "final_state", "grad q", "grad k", "grad v", "grad log_decay", "grad initial_state",
        *(["grad document_state"] if "packed" in case else []),
    }  # fmt: skip
    for name, error in result.items():
        assert isinstance(error, float)
        assert error <= 2e-5, (name, error)


@pytest.mark.slow
def test_the_library_keeps_what_the_planner_counts(
    interpreted: dict[str, dict[str, object]],
) -> None:
    kept = interpreted["kept"]
    assert kept["aside"] == kept["planned"]
    assert kept["keeps q alone"] == [True, False, False, False, False]


def test_float64_goes_to_the_chunked_kernel_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    operands = linear_operands(2, 40)
    operands.append(document_state(operands))
    sequence = documents([[15, 25], [40]])
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        actual = linear_results(fla.linear_attention, operands, sequence)
    assert "no torch.float64 kernel" in caplog.text
    assert_results(actual, recurrence(operands, sequence), relative=1e-13)


def test_states_go_to_the_first_document_and_come_from_the_last() -> None:
    sequence = documents([[2, 3], [5], [1, 1, 3]])
    states = torch.arange(3.0).view(3, 1, 1, 1) + 1
    start = torch.full((1, 1, 1), 9.0)

    def entering(*arguments: torch.Tensor | None, packed: bool = True) -> list[float] | None:
        placed = fla._entering_states(*arguments, 3, sequence if packed else None)  # type: ignore[arg-type]
        return None if placed is None else placed.flatten().tolist()

    assert entering(states, None) == [1, 0, 2, 3, 0, 0]
    assert entering(states, start) == [1, 9, 2, 3, 9, 9]
    assert entering(None, start) == [9] * 6
    assert entering(None, None) is None
    assert entering(states, start, packed=False) == [1, 2, 3]
    assert entering(None, start, packed=False) == [9] * 3
    assert fla._last_documents(sequence) == [1, 2, 5]


def test_the_final_state_holds_one_matrix_a_kv_head_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = torch.randn(2, 4, 3, 3)

    def run(operands: list[torch.Tensor], *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return operands[0], made

    monkeypatch.setattr(fla, "_run", run)
    q, k = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 2, 3)
    _, final = fla.linear_attention(
        q, k, k, k.abs().neg(), scale=1.0, sequence=None, output_final_state=True
    )
    assert final is not None
    assert torch.equal(final, made[:, ::2])
    assert final.untyped_storage().nbytes() == final.nbytes
