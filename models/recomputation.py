"""What of each layer is computed again in the backward pass instead of being kept.

Whole blocks go through torch's own checkpoint (`models.model`), parts through `models.recompute`:

| kind | no longer kept | runs again |
| --- | --- | --- |
| norms | what q, k, v, gate, up and (`L`) output projections read | norm, encoding |
| activations | silu(gate), and what the down projection reads | silu, product, encoding |
| mixers | all between q, k, v as projected and what the output projection reads | the mixer |

Nothing is kept in their stead but q, k, v and the low-rank gate for mixers, which run from the
norms of q and k over rotation, gate and kernel to head norm and encoding; parallel branches run
together. Norms of branches after their output projection run again with `norms`, from what these
put out. With sequence parallelism a norm runs again with the gather of all tokens that follows it.
Where channels are cut over ranks, an encoding communicates one number a token again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from models.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputation:
    """Layers, by index in the whole model, of which something is computed again.

    Args:
        blocks: everything but the residual stream between blocks.
        norms: what the block's norms put out.
        activations: the SwiGLU product.
        mixers: the mixer between its projections.
    """

    blocks: frozenset[int] = frozenset()
    norms: frozenset[int] = frozenset()
    activations: frozenset[int] = frozenset()
    mixers: frozenset[int] = frozenset()

    def check(self, config: ModelConfig) -> None:
        """Refuse what the model does not have.

        Raises:
            ValueError: a layer that is not there or has no mixer, or one that is in `blocks` too.
        """
        for kind in fields(self):
            layers: frozenset[int] = getattr(self, kind.name)
            wrong = sorted(layers - set(range(config.num_hidden_layers)))
            if wrong:
                raise ValueError(
                    f"recompute.{kind.name} ({wrong}) must be block indices below the number of "
                    f"layers: got {config.num_hidden_layers}. Remove them."
                )
        bare = sorted(i for i in self.mixers if not config.layers.mixers[i])
        if bare:
            raise ValueError(
                f"recompute.mixers ({bare}) must be layers with a mixer: got {config.mixers}. "
                "Remove them."
            )
        twice = sorted(self.blocks & (self.norms | self.activations | self.mixers))
        if twice:
            raise ValueError(
                f"recompute.blocks ({twice}) must not be named by another kind too: whole blocks "
                "are computed again anyway. Name them once."
            )


NOTHING = Recomputation()
