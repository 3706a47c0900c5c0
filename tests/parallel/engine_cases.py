"""Tiny training runs for the engine's tests: one definition of each, and how a rank makes it.

What such a run must compute is in `engine_oracle`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from models.config import ModelConfig, NeuronKind, SpikingConfig, ThresholdGrad
from models.expert_config import ExpertConfig
from models.initialisation import tensor_for
from models.layouts import parameter_layouts
from models.lesson import Goals
from models.mixer_config import (
    BranchConfig,
    FeatureMap,
    GateKind,
    LinearAttentionConfig,
    SinkConfig,
)
from models.model import Model
from models.recomputation import Recomputation
from models.spiking.neurons import Spikes
from models.spiking.recorder import NUM_BINS, SpikeRecorder
from parallel.boxes import Box
from parallel.config import ParallelConfig, Precision, Shard
from parallel.engine import ParamGroup, TorchEngine
from parallel.mesh import Mesh
from parallel.pipeline_cut import cut
from parallel.teacher import TeacherSpec

STEPS = 3
ROWS = 8
TOKENS = 20
STATISTICS_TOKENS = 16
SEED = 7
LEARNING_RATE = 3e-3


LEVELS = {shard: ParallelConfig(shard=shard) for shard in Shard}


class RuleName(Enum):
    adamw = "adamw"
    sgd = "sgd"


@dataclass(frozen=True)
class Rule:
    name: RuleName = RuleName.adamw
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0


@dataclass(frozen=True)
class Case:
    """One way to compute the same run; `oracle` drops everything that must not matter.

    `is_cuttable` takes a deeper model, whose heads and channels four ranks can share out.
    `recompute` drops the first two blocks, `selective` norms, activations and mixers of all, and of
    experts one layer whole and what others do inside. `branches` makes every mixer of the cuttable
    model two parallel ones with a key-tied gate, `moe` every other layer one of experts, whose
    routers start at zero with `ties`. `sinks` gives it sink tokens, `teacher_sinks` the teacher
    and, where no streams are compared, a width of its own.
    """

    parallel: ParallelConfig = ParallelConfig()
    is_cuttable: bool = False
    branches: BranchConfig | None = None
    microbatch_rows: int = ROWS
    recompute: bool = False
    selective: bool = False
    rule: Rule = Rule()
    tied: bool = False
    frozen: bool = False
    spiking: bool = True
    through: bool = False
    teacher: Goals | None = None
    offload: bool = False
    precision: Precision = Precision.fp64
    moe: ExpertConfig | None = None
    ties: bool = False
    sinks: SinkConfig = SinkConfig()
    teacher_sinks: SinkConfig = SinkConfig()

    def oracle(self) -> Case:
        return Case(
            rule=self.rule,
            tied=self.tied,
            frozen=self.frozen,
            spiking=self.spiking,
            through=self.through,
            teacher=self.teacher,
            is_cuttable=self.is_cuttable,
            branches=self.branches,
            moe=self.moe,
            ties=self.ties,
            sinks=self.sinks,
            teacher_sinks=self.teacher_sinks,
        )


@dataclass(frozen=True)
class Rows:
    tokens: Tensor
    labels: Tensor
    document_ids: Tensor


@dataclass(frozen=True)
class Run:
    """What one run computed: numbers of every step, gradients of the first, final parameters.

    `routing` are the metrics of expert layers.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    statistics: dict[str, float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    routing: tuple[dict[str, float], ...]


def config_of(case: Case) -> ModelConfig:
    """Sizes that no number of ranks divides; the gate has fewer rows than four ranks."""
    if case.is_cuttable:
        config = cuttable_config(case)
        if case.moe is None:
            return config
        return replace(config, ffns="[d e]*2", ffn_bias=False, moe=case.moe)
    return ModelConfig(
        vocab_size=61,
        hidden_size=18,
        intermediate_size=22,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        mixers="L S",
        ffns="d*2",
        qkv_bias=True,
        qk_norm=True,
        window_tokens=5,
        tie_word_embeddings=case.tied,
        linear=LinearAttentionConfig(gate_low_rank_dim=3),
        initializer_range=0.3,
    )


def cuttable_config(case: Case) -> ModelConfig:
    """Every mixer, two layers a stage of two; a vocabulary that is padded where it is cut.

    The head norm divides by almost nothing where ReLU leaves a query and its keys nothing in
    common. In float32 that amplifies rounding (one process is 3e-3 from its own float64 in the
    gradient norm of step 4), so that runs in float32 take a larger epsilon there.
    """
    linear = LinearAttentionConfig(gate_low_rank_dim=3)
    if case.precision is Precision.fp32:
        linear = replace(linear, norm_eps=1e-2)
    mixers = "L S F L"
    if case.branches is not None:
        mixers = "[L+S L+F]*2"
        linear = replace(
            linear, feature_map=FeatureMap.sigmoid, gate=GateKind.key_tied, gate_offset=1.0,
            gate_floor=0.05,
        )  # fmt: skip
    return ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        mixers=mixers,
        ffns="d*4",
        branches=case.branches or BranchConfig(),
        sinks=case.sinks,
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        qk_norm=True,
        window_tokens=5,
        tie_word_embeddings=case.tied,
        linear=linear,
        initializer_range=0.3,
    )


def spiking_of(case: Case) -> SpikingConfig:
    return SpikingConfig(
        neuron=NeuronKind.adaptive if case.spiking else NeuronKind.off,
        threshold_grad=ThresholdGrad.through if case.through else ThresholdGrad.detached,
    )


def spikes_of(case: Case, recorder: SpikeRecorder | None = None) -> Spikes | None:
    return Spikes(k=3.0, recorder=recorder) if case.spiking else None


def groups_of(case: Case, names: Sequence[str]) -> list[ParamGroup]:
    """Matrices decay; gates learn at another rate; the frozen case leaves the embedding out."""
    trained = [n for n in names if not (case.frozen and n in ("embedding.weight", FROZEN_NORM))]
    gates = tuple(n for n in trained if "gate_" in n)
    norms = tuple(n for n in trained if n not in gates and (n.endswith(("norm.weight", "bias"))))
    others = tuple(n for n in trained if n not in gates and n not in norms)
    return [
        ParamGroup(others, weight_decay=0.1, lr_factor=1.0),
        ParamGroup(norms, weight_decay=0.0, lr_factor=1.0),
        ParamGroup(gates, weight_decay=0.0, lr_factor=2.0),
    ]


FROZEN_NORM = "blocks.1.mixer_norm.weight"


def rows_of(step: int) -> Rows:
    """All rows of a step: several documents a row, unequal numbers of masked labels."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(61, (ROWS, TOKENS), generator=generator)
    labels = torch.randint(61, (ROWS, TOKENS), generator=generator)
    for row in range(ROWS):
        labels[row, : 2 * row + 1] = -100
    cuts = torch.rand(ROWS, TOKENS, generator=generator) < 0.15
    cuts[:, 0] = False
    return Rows(tokens, labels, cuts.long().cumsum(dim=1))


def share_of(rows: Rows, rank: int, size: int, microbatch_rows: int) -> list[Rows]:
    """The contiguous rows of one rank, in microbatches."""
    each = ROWS // size
    chunks = range(rank * each, (rank + 1) * each, microbatch_rows)
    ends = [min(start + microbatch_rows, (rank + 1) * each) for start in chunks]
    return [
        Rows(rows.tokens[a:b], rows.labels[a:b], rows.document_ids[a:b])
        for a, b in zip(chunks, ends, strict=True)
    ]


def build_engine(mesh: Mesh, case: Case, *, seed: int | None = SEED) -> TorchEngine:
    config = config_of(case)
    names = trainable(config)
    spec = TeacherSpec(teacher_config(case), case.teacher or Goals(0, 0, 1), case.offload)
    engine = TorchEngine(
        config,
        mesh=mesh,
        groups=groups_of(case, names),
        rule=case.rule,
        spiking=spiking_of(case),
        precision=case.precision,
        parallel=case.parallel,
        stages=cut(config, case.parallel, sequence_length=TOKENS),
        recompute=recomputation_of(case, config),
        seed=seed,
        teacher=None if case.teacher is None else spec,
        loss_chunk_tokens=16,
    )
    if case.ties:
        for name in routers(engine.parameters):
            engine.parameters[name].local.zero_()
    if engine.teacher is not None:
        weights = dict(teacher_model(case).named_parameters())
        for name, box in engine.teacher.parameters.items():
            box.fill(weights[name].data)
    return engine


def routers(names: Iterable[str]) -> list[str]:
    """Those that give experts their scores."""
    return [name for name in names if name.endswith("router.weight")]


def trainable(config: ModelConfig) -> list[str]:
    """Parameters with a gradient."""
    return [name for name, layout in parameter_layouts(config).items() if not layout.is_state]


def recomputation_of(case: Case, config: ModelConfig) -> Recomputation:
    layers = frozenset(range(config.num_hidden_layers))
    if case.selective:
        experts = frozenset({1, 3}) if case.moe else frozenset()
        return Recomputation(
            norms=layers,
            activations=layers,
            mixers=layers,
            expert_layers=experts & {1},
            experts=experts & {3},
        )
    return Recomputation(blocks=frozenset({0, 1}) if case.recompute else frozenset())


def train_step(
    engine: TorchEngine, case: Case, step: int, recorder: SpikeRecorder | None = None
) -> float:
    """Forward and backward of one step; returns its loss."""
    return step_metrics(engine, case, step, recorder)["loss"]


def step_metrics(
    engine: TorchEngine, case: Case, step: int, recorder: SpikeRecorder | None = None
) -> dict[str, float]:
    """Forward and backward of one step; returns all that the engine says of it."""
    mine = share_of(rows_of(step), engine.mesh.dp_rank, engine.mesh.dp_size, case.microbatch_rows)
    mine_targets = sum(int((m.labels != -100).sum()) for m in mine)
    targets = engine.sum_over_ranks(torch.tensor([mine_targets], dtype=torch.float64))
    return engine.forward_backward(mine, num_targets=int(targets), spikes=spikes_of(case, recorder))


def train(engine: TorchEngine, case: Case, *, first: int = 0, last: int = STEPS) -> Run:
    losses, norms, routing = [], [], []
    gradients: dict[str, Tensor] = {}
    statistics: dict[str, float] = {}
    for step in range(first, last):
        recorder = SpikeRecorder(STATISTICS_TOKENS) if step == first else None
        found = step_metrics(engine, case, step, recorder)
        losses.append(found["loss"])
        routing.append({name: value for name, value in found.items() if name.startswith("moe/")})
        if recorder is not None:
            gradients = gather(engine.mesh, engine.gradients())
            recorder.load(engine.sum_by_name(recorder.tensors()))
            statistics = statistics_of(recorder)
        norms.append(engine.clip_and_step(LEARNING_RATE))
    final = gather(engine.mesh, engine.parameters)
    return Run(tuple(losses), tuple(norms), statistics, gradients, final, tuple(routing))


def gather(mesh: Mesh, boxes: dict[str, Box]) -> dict[str, Tensor]:
    """Whole tensors of all ranks' boxes, on every rank."""
    # As arrays: torch takes 30 times as long to read a pickled tensor.
    mine = {
        name: (box.global_shape, box.slices, box.local.detach().numpy())
        for name, box in boxes.items()
    }
    whole: dict[str, Tensor] = {}
    for part in mesh.gather(mine):
        for name, (shape, slices, array) in part.items():
            values = torch.from_numpy(array)
            tensor = whole.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype))
            before = tensor[slices]
            assert bool((before.isnan() | (before == values)).all()), f"{name}: copies differ"
            tensor[slices] = values
    return whole


def statistics_of(recorder: SpikeRecorder) -> dict[str, float]:
    """Metrics, and how many values they are of: means alone would not see one counted twice."""
    counted = {
        f"{site}/num_values": float(sums[:NUM_BINS].sum())
        for site, sums in recorder.tensors().items()
    }
    return recorder.summary() | counted


def teacher_config(case: Case) -> ModelConfig:
    """A plain Transformer of the student's sizes with a head of its own, or one with sinks."""
    config, goals = config_of(case), case.teacher
    layers, is_free = config.num_hidden_layers, goals is not None and goals.hidden == 0
    return replace(
        config,
        mixers=f"F*{layers}",
        ffns=f"d*{layers}",
        tie_word_embeddings=False,
        sinks=case.teacher_sinks,
        hidden_size=32 if case.teacher_sinks.num_tokens and is_free else config.hidden_size,
    )


def teacher_model(case: Case) -> Model:
    """The whole teacher in float64."""
    config = teacher_config(case)
    model = Model(config).double()
    layouts = model.layouts()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensor_for(name, layouts[name], config, SEED + 1))
    return model
