"""What of each layer is computed again in the backward pass instead of being kept.

Whole blocks go through torch's own checkpoint (`models.model`), parts through `models.recompute`:

| kind | no longer kept | runs again |
| --- | --- | --- |
| norms | what q, k, v, gate, up and (`L`) output projections read | norm, encoding |
| activations | silu(gate), and what down projection and router read | silu, product, encoding |
| mixers | all between q, k, v as projected and what the output projection reads | the mixer |
| experts | all of routed and shared experts but the shared ones' output | experts, dispatch |
| expert_layers | all of an expert layer but what it reads and who goes where | the layer |

Of expert layers `activations`, `experts` and `expert_layers` are what the SpikingBrain report
(section 4.1) calls light, medium and full recomputation.

Nothing is kept in their stead but q, k, v and the low-rank gate for mixers, which run from the
norms of q and k over rotation, gate and kernel to head norm and encoding; parallel branches run
together. Norms of branches after their output projection run again with `norms`, from what these
put out. With sequence parallelism a norm runs again with the gather of all tokens that follows it.
Where channels are cut over ranks, an encoding communicates one number a token again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from models.config import ModelConfig
from models.layer_pattern import FfnKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputation:
    """Layers, by index in the whole model, of which something is computed again.

    Args:
        blocks: everything but the residual stream between blocks.
        norms: what the block's norms put out.
        activations: the SwiGLU product; in expert layers the router too.
        mixers: the mixer between its projections.
        experts: routed and shared experts, with their activations.
        expert_layers: expert layers with router and dispatch.
    """

    blocks: frozenset[int] = frozenset()
    norms: frozenset[int] = frozenset()
    activations: frozenset[int] = frozenset()
    mixers: frozenset[int] = frozenset()
    experts: frozenset[int] = frozenset()
    expert_layers: frozenset[int] = frozenset()

    def check(self, config: ModelConfig) -> None:
        """Refuse what the model does not have.

        Raises:
            ValueError: a layer that is not there or has no mixer or no experts, or one that is
                named by a kind and by a part of it too.
        """
        mixers, ffns = config.layers.mixers, config.layers.ffns
        for kind in fields(self):
            layers: frozenset[int] = getattr(self, kind.name)
            wrong = sorted(layers - set(range(config.num_hidden_layers)))
            if wrong:
                raise ValueError(
                    f"recompute.{kind.name} ({wrong}) must be block indices below the number of "
                    f"layers: got {config.num_hidden_layers}. Remove them."
                )
        self._check_layers("mixers", "with a mixer", config.mixers, [bool(m) for m in mixers])
        for name in ("experts", "expert_layers"):
            has_experts = [kind is FfnKind.mixture_of_experts for kind in ffns]
            self._check_layers(name, "of experts", config.ffns, has_experts)
        parts = self.norms | self.activations | self.mixers | self.experts | self.expert_layers
        if twice := sorted(self.blocks & parts):
            raise ValueError(
                f"recompute.blocks ({twice}) must not be named by another kind too: whole blocks "
                "are computed again anyway. Name them once."
            )
        if twice := sorted(self.expert_layers & self.experts):
            raise ValueError(
                f"recompute.expert_layers ({twice}) must not be in experts too, which are computed "
                "again anyway. Name them once."
            )

    def _check_layers(self, name: str, what: str, pattern: str, has_it: Sequence[bool]) -> None:
        """Refuse layers without what is to be computed again."""
        bare = sorted(layer for layer in getattr(self, name) if not has_it[layer])
        if bare:
            raise ValueError(
                f"recompute.{name} ({bare}) must be layers {what}: got {pattern}. Remove them."
            )


NOTHING = Recomputation()
