"""What the engine's tiny training runs must compute, and how a run is compared with it.

The plain model with plain torch, no engine and no ranks: whole rows in one pass, one long gradient
vector, torch's optimizer on whole parameters, every expert on every token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.initialisation import tensor_for
from models.model import Model
from models.routing import Routing
from models.sequence import SequenceContext
from models.spiking.recorder import SpikeRecorder
from parallel.engine import ParamGroup
from tests.models.dense_experts import DenseExperts, made_dense, move_states
from tests.parallel.engine_cases import (
    LEARNING_RATE,
    ROWS,
    SEED,
    STATISTICS_TOKENS,
    STEPS,
    TOKENS,
    Case,
    Rows,
    Rule,
    RuleName,
    Run,
    config_of,
    groups_of,
    routers,
    rows_of,
    share_of,
    spikes_of,
    spiking_of,
    statistics_of,
    teacher_model,
    trainable,
)
from tests.support.closeness import assert_close

LOSS = 1e-10
GRADIENT = 1e-9
ROUTING = Routing(num_rows=ROWS, num_tokens=ROWS * TOKENS)


def assert_same_run(actual: Run, expected: Run) -> None:
    """Losses, norms, gradients of the first step, final parameters and what routers did."""
    assert actual.gradients.keys() == expected.gradients.keys()
    for parameter, gradient in expected.gradients.items():
        assert_close(actual.gradients[parameter], gradient, relative=GRADIENT, name=parameter)
    assert_close(actual.losses, expected.losses, relative=LOSS, name="losses")
    assert_close(actual.norms, expected.norms, relative=GRADIENT, name="norms")
    for parameter, value in expected.parameters.items():
        assert_close(actual.parameters[parameter], value, relative=GRADIENT, name=parameter)
    for found, wanted in zip(actual.routing, expected.routing, strict=True):
        for metric, value in wanted.items():
            assert_close(found[metric], value, relative=GRADIENT, name=metric)


def assert_same_spikes(actual: Run, case: Case) -> None:
    """Those of all channels and tokens, once each: whatever is cut, recomputed or traced."""
    if not case.spiking:
        assert actual.statistics == {}
        return
    plain = replace(case.oracle(), microbatch_rows=case.microbatch_rows)
    assert actual.statistics == oracle_statistics(plain)


@functools.cache
def expected_run(case: Case) -> Run:
    """The run of a layout's `oracle`, computed once for all layouts that share it."""
    return oracle(case)


def oracle(case: Case, *, num_steps: int = STEPS) -> Run:
    """The same run by the plain model in one pass a step."""
    model = plain_model(case)
    experts = made_dense(model)
    groups = groups_of(case, trainable(model.config))
    parameters = dict(model.named_parameters())
    trained = [parameters[name] for group in groups for name in group.names]
    optimizer = _plain_optimizer(case.rule, groups, parameters)
    losses, norms, routing = [], [], []
    gradients: dict[str, Tensor] = {}
    for step in range(num_steps):
        rows = rows_of(step)
        sequence = SequenceContext.from_document_ids(rows.document_ids)
        loss = model(
            rows.tokens, sequence, labels=rows.labels, spikes=spikes_of(case), routing=ROUTING
        )
        loss = loss / (rows.labels != -100).sum()
        model.zero_grad()
        total = loss + sum(sum(layer.losses) for layer in experts)
        if case.teacher is not None:
            extra = learned(model, teacher_model(case), rows, sequence, case)
            total = total + extra / (rows.labels != -100).sum()
        total.backward()
        if step == 0:
            gradients = {
                name: parameters[name].grad.clone() for group in groups for name in group.names
            }
        norm = float(torch.cat([parameter.grad.flatten() for parameter in trained]).norm())
        norms.append(norm)
        if case.rule.clip_norm is not None and norm > case.rule.clip_norm:
            for parameter in trained:
                parameter.grad *= case.rule.clip_norm / norm
        losses.append(float(loss.detach()))
        optimizer.step()
        routing.append(_routing_metrics(experts))
        move_states(experts)
    final = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Run(tuple(losses), tuple(norms), {}, gradients, final, tuple(routing))


def _routing_metrics(experts: Sequence[DenseExperts]) -> dict[str, float]:
    """Those that follow from what the dense layers keep."""
    metrics = {}
    for layer in experts:
        loads = layer.counts / layer.counts.sum()
        metrics[f"moe/{layer.layer}/load_max"] = float(loads.max())
        metrics[f"moe/{layer.layer}/load_min"] = float(loads.min())
        metrics[f"moe/{layer.layer}/dead_experts"] = float((loads == 0).sum())
    if experts:
        metrics["moe/balance_loss"] = sum(float(layer.losses[0].detach()) for layer in experts)
        metrics["moe/z_loss"] = sum(float(layer.losses[1].detach()) for layer in experts)
    return metrics


def _plain_optimizer(
    rule: Rule, groups: Sequence[ParamGroup], parameters: dict[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    arguments = [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "lr": LEARNING_RATE * group.lr_factor,
        }
        for group in groups
    ]
    if rule.name is RuleName.sgd:
        return torch.optim.SGD(arguments)
    betas = (rule.beta1, rule.beta2)
    return torch.optim.AdamW(arguments, betas=betas, eps=rule.eps, foreach=False)


@functools.cache
def oracle_statistics(case: Case) -> dict[str, float]:
    """What the plain model's neurons do in the first step, microbatch by microbatch."""
    model = plain_model(case)
    recorder = SpikeRecorder(STATISTICS_TOKENS)
    for rows in share_of(rows_of(0), 0, 1, case.microbatch_rows):
        sequence = SequenceContext.from_document_ids(rows.document_ids)
        model(rows.tokens, sequence, spikes=spikes_of(case, recorder), routing=ROUTING)
    return statistics_of(recorder)


def learned(
    student: Model, teacher: Model, rows: Rows, sequence: SequenceContext, case: Case
) -> Tensor:
    """What the goals add to the summed loss, from whole logits and torch's own divergence."""
    goals = case.teacher
    assert goals is not None
    streams: dict[Model, list[Tensor]] = {student: [], teacher: []}
    logits = {}
    for model, spikes, routing in ((student, spikes_of(case), ROUTING), (teacher, None, None)):

        def keep(_layer: int, x: Tensor, model: Model = model) -> Tensor:
            streams[model].append(x)
            return x

        hidden, _ = model.streams(
            rows.tokens, sequence, spikes=spikes, routing=routing, observe=keep
        )
        logits[model] = model.apply_head(hidden) / goals.temperature
    counted = rows.labels != -100
    kl = torch.nn.functional.kl_div(
        logits[student][counted].log_softmax(-1),
        logits[teacher][counted].detach().log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    if goals.hidden == 0:
        return goals.kl * goals.temperature**2 * kl
    pairs = zip(streams[student], streams[teacher], strict=True)
    mse = sum((s - t.detach())[counted].square().mean(-1).sum() for s, t in pairs)
    return goals.kl * goals.temperature**2 * kl + goals.hidden * mse


def plain_model(case: Case) -> Model:
    """The whole model in float64 at its initial values."""
    config = config_of(case)
    model = Model(config, spiking=spiking_of(case), loss_chunk_tokens=16).double()
    layouts = model.layouts()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensor_for(name, layouts[name], config, SEED))
    if case.ties:
        for name in routers(layouts):
            model.get_parameter(name).data.zero_()
    return model
