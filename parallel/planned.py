"""What a planner reasons about: a job, the layout it is given, and the pieces of both on one rank.

Sizes only; nothing here builds a module, a mesh or a process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from models.activation_memory import block_footprint
from models.config import ModelConfig, NeuronKind, SpikingConfig
from models.head_memory import embedding_footprint, head_footprint
from models.memory_tape import Footprint
from models.operation_memory import PLAIN_KERNELS, Again, Workload
from models.recomputation import NOTHING, Recomputation
from parallel.axes import axis_sizes, expert_axis_sizes
from parallel.config import ParallelConfig, PipelineSchedule, Precision, Shard
from parallel.fully_sharded import compute_dtype, master_dtype
from parallel.memory_replay import StageBytes
from parallel.pipeline import ONE_STAGE_A_RANK
from parallel.pipeline_cut import StageCut, cut
from parallel.schedule_order import Action, orders
from parallel.unit_replay import Rules
from parallel.unit_sizes import Shares, stage_units, vocabulary_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One curriculum stage of a run: what is trained, on rows of which length, in which precision.

    `rows` are those of one step on all ranks, `frozen` the parameters that are not trained.
    `has_moments`: AdamW keeps two values a parameter. `kernels` name the linear and the softmax
    attention kernel.
    """

    model: ModelConfig
    spiking: SpikingConfig = field(default_factory=SpikingConfig)
    precision: Precision
    length: int
    rows: int
    microbatch_rows: int
    recompute: Recomputation = NOTHING
    loss_chunk_tokens: int = 1024
    frozen: frozenset[str] = frozenset()
    has_moments: bool = True
    kernels: tuple[str, str] = ("chunked", "blocked")

    @property
    def master(self) -> int:
        """Bytes of a value at rest."""
        return master_dtype(self.precision).itemsize

    @property
    def narrow(self) -> int:
        """Bytes of a value in compute."""
        return compute_dtype(self.precision).itemsize

    def again(self, layer: int) -> Again:
        """What one layer computes again."""
        named = self.recompute
        return Again(
            block=layer in named.blocks, norms=layer in named.norms,
            activations=layer in named.activations, mixer=layer in named.mixers,
            experts=layer in named.experts, expert_layer=layer in named.expert_layers,
        )  # fmt: skip

    @property
    def is_spiking(self) -> bool:
        """Whether neurons sit at the inputs of projections."""
        return self.spiking.neuron is not NeuronKind.off


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the mesh axes (`parallel.mesh.axis_sizes`) and what is done along them."""

    parallel: ParallelConfig
    pp: int
    dp_replicate: int
    dp_shard: int
    tp: int

    @classmethod
    def of(cls, parallel: ParallelConfig, num_devices: int) -> Layout:
        """The axes of so many ranks.

        Raises:
            ValueError: axes whose product is another number.
        """
        pp, dp_replicate, dp_shard, tp = axis_sizes(parallel, num_devices)
        return cls(parallel=parallel, pp=pp, dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp)

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def ep(self) -> int:
        """Ranks that experts are cut over."""
        return self.parallel.ep

    @property
    def edp_replicate(self) -> int:
        """Copies of a rank's experts."""
        return self._expert_sizes()[1]

    @property
    def edp_shard(self) -> int:
        """Ranks that share out one copy of a rank's experts."""
        return self._expert_sizes()[2]

    @property
    def num_devices(self) -> int:
        """Ranks of all axes."""
        return self.pp * self.dp * self.tp

    @property
    def shard(self) -> Shard:
        """The shard level that is run: zero_bubble keeps parameters gathered."""
        is_split = self.pp > 1 and self.parallel.schedule is PipelineSchedule.zero_bubble
        if is_split and self.parallel.shard is Shard.parameters:
            return Shard.gradients
        return self.parallel.shard

    def _expert_sizes(self) -> tuple[int, ...]:
        sizes = (self.pp, self.dp_replicate, self.dp_shard, self.tp)
        return expert_axis_sizes(sizes, self.ep)

    def num_microbatches(self, job: Job) -> int:
        """Of a step, on each data-parallel rank."""
        return job.rows // (self.dp * job.microbatch_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What a job on a layout gives every rank: stages, what they are made of, the order of work.

    Sizes are those of one shard of the parameters; the first holds the most.
    """

    job: Job
    layout: Layout
    work: Workload
    shares: Shares
    stages: tuple[StageCut, ...]
    stage_bytes: tuple[StageBytes, ...]
    orders: tuple[tuple[Action, ...], ...]

    @classmethod
    def of(
        cls,
        job: Job,
        layout: Layout,
        *,
        stages: Sequence[StageCut] | None = None,
        shard_rank: int = 0,
    ) -> Assignment:
        """Work out what each stage is made of; `stages` None cuts the model by the job's rows."""
        parallel = layout.parallel
        work = Workload(
            model=job.model, spiking=job.spiking, rows=job.microbatch_rows, length=job.length,
            narrow=job.narrow, wide=job.master, kernels=job.kernels, tp=layout.tp,
            sequence_parallel=parallel.sequence_parallel, ep=parallel.ep,
        )  # fmt: skip
        shares = Shares(
            tp=layout.tp, dp_shard=layout.dp_shard, vocab_multiple=parallel.vocab_multiple,
            shard_rank=shard_rank, dp_replicate=layout.dp_replicate, ep=parallel.ep,
        )  # fmt: skip
        if stages is None:
            stages = cut(job.model, parallel, sequence_length=job.length)
        return cls(
            job=job,
            layout=layout,
            work=work,
            shares=shares,
            stages=tuple(stages),
            stage_bytes=tuple(_stage_bytes(job, work, shares, stage) for stage in stages),
            orders=tuple(tuple(each) for each in orders(parallel, layout.num_microbatches(job))),
        )

    @property
    def num_microbatches(self) -> int:
        """Of a step, on each data-parallel rank."""
        return self.layout.num_microbatches(self.job)

    @property
    def rules(self) -> Rules:
        """How parameters are held."""
        is_pipelined = self.layout.pp > 1
        return Rules(
            master=self.job.master,
            narrow=self.job.narrow,
            shard=self.layout.shard,
            is_pipelined=is_pipelined,
            # What runs the plain kernels is a processor, which talks through gloo.
            copies_scattered=self.job.kernels == PLAIN_KERNELS,
            keeps_sent=is_pipelined and self.layout.parallel.schedule not in ONE_STAGE_A_RANK,
        )

    def of_rank(self, pp_rank: int) -> list[tuple[StageCut, StageBytes]]:
        """The stages of one pp coordinate."""
        pairs = zip(self.stages, self.stage_bytes, strict=True)
        return [(stage, sizes) for stage, sizes in pairs if stage.pp_rank == pp_rank]


def sinks_are_read(stage: StageCut, layer: int) -> bool:
    """Whether the sinks that leave a layer enter another, and so get a gradient.

    FSDP2 and torch's pipelining give zeros to whatever enters a block or a stage.
    """
    return not (stage.has_head and layer == stage.end_layer - 1)


def _stage_bytes(job: Job, work: Workload, shares: Shares, stage: StageCut) -> StageBytes:
    rows = vocabulary_rows(job.model, shares)
    layers = range(stage.first_layer, stage.end_layer)
    known: dict[object, Footprint] = {}
    footprints = []
    for layer in layers:
        pattern = job.model.layers
        kind = pattern.mixers[layer], pattern.ffns[layer], job.again(layer)
        is_read = sinks_are_read(stage, layer)
        if (kind, is_read) not in known:
            known[kind, is_read] = block_footprint(work, *kind, sinks_are_read=is_read)
        footprints.append(known[kind, is_read])
    head = None
    if stage.has_head:
        head = head_footprint(work, rows, chunk_tokens=job.loss_chunk_tokens)
    return StageBytes(
        index=stage.index,
        units=stage_units(job.model, stage, shares, precision=job.precision, frozen=job.frozen),
        layers=layers,
        footprints=footprints,
        embedding=embedding_footprint(work, rows) if stage.has_embedding else None,
        head=head,
        stream=work.stream + (work.of_sinks().stream if job.model.uses_sinks else 0),
    )
