"""Which stretch of a model a module holds: all of it, or what one pipeline stage does."""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelPart:
    """Layers `first_layer` to `end_layer` (excluded), with the embedding or the head or neither.

    A part with the head has the final norm and the loss too.
    """

    first_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool

    @classmethod
    def whole(cls, config: ModelConfig) -> ModelPart:
        """The model itself."""
        return cls(0, config.num_hidden_layers, has_embedding=True, has_head=True)

    @property
    def layers(self) -> range:
        """Global indices of the layers."""
        return range(self.first_layer, self.end_layer)
