"""Which parameters are trained, which decay, and whose learning rate has its own factor.

Owns names only: groups are lists of parameter names, the engine owns tensors and the update.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from parallel.engine_protocol import ParamGroup
from training.config import OptimizerConfig

logger = logging.getLogger(__name__)


def build_groups(
    names: Sequence[str], config: OptimizerConfig, *, new_parameters: Collection[str] = ()
) -> list[ParamGroup]:
    """Sort parameter names into at most four groups; frozen ones are in none.

    Args:
        names: every parameter of the model, in order.
        config: freeze patterns, weight decay, factor of new parameters.
        new_parameters: names that conversion added (a checkpoint's manifest lists them).

    Raises:
        ValueError: a freeze pattern that matches nothing, or nothing left to train.
    """
    frozen = frozen_names(names, config.freeze)
    trained = [name for name in names if name not in frozen]
    if config.new_parameter_lr_factor != 1.0 and not set(trained) & set(new_parameters):
        logger.warning(
            "optimizer.new_parameter_lr_factor (%g) has no effect: no trained parameter is new. "
            "Start from a converted checkpoint (init.checkpoint) or set it to 1.",
            config.new_parameter_lr_factor,
        )
    groups: list[ParamGroup] = []
    for is_new in (False, True):
        for decay in (True, False):
            members = tuple(
                name
                for name in trained
                if (name in new_parameters) is is_new and decays(name) is decay
            )
            if members:
                groups.append(
                    ParamGroup(
                        names=members,
                        weight_decay=config.weight_decay if decay else 0.0,
                        lr_factor=config.new_parameter_lr_factor if is_new else 1.0,
                    )
                )
    return groups


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to norms, gates and biases.

    Nor to the weights of branches.
    """
    module, _, leaf = name.rpartition(".")
    owner = module.rpartition(".")[2]
    return not (
        leaf == "bias" or owner.endswith("norm") or owner in ("gate_up", "gate_down", "merge")
    )


def frozen_names(names: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    """Names that match one of the shell patterns.

    Raises:
        ValueError: a pattern without a match (near names are shown), or everything matched.
    """
    frozen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
            raise ValueError(
                f"optimizer.freeze ({pattern!r}) must match a parameter name: got no match. "
                f"Near names: {', '.join(near)}."
            )
        frozen.update(matched)
    if names and len(frozen) == len(names):
        raise ValueError(
            f"optimizer.freeze ({list(patterns)}) must leave something to train: it matches all "
            f"{len(names)} parameters. Remove a pattern."
        )
    return frozenset(frozen)
