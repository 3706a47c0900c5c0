from __future__ import annotations

import math

import pytest
import torch

from models.expert_config import Balance, ExpertConfig
from models.initialisation import initialise, tensor_for
from models.layouts import parameter_layouts
from models.mixer_config import BranchConfig, BranchMerge
from models.model import Model
from tests.models.tiny import tiny_config
from tests.support.closeness import assert_close


def _state(model: Model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_values_do_not_depend_on_construction_dtype_or_other_layers() -> None:
    torch.manual_seed(0)
    first = Model(tiny_config())
    initialise(first, seed=5)
    torch.manual_seed(99)
    torch.randn(17)
    with torch.device("meta"):
        second = Model(tiny_config())
    second.to_empty(device="cpu").to(torch.float64)
    initialise(second, seed=5)
    longer = Model(tiny_config(mixers="L S F _ L", ffns="d*5"))
    initialise(longer, seed=5)
    others = (_state(second), _state(longer))
    for name, value in _state(first).items():
        for other in others:
            assert torch.equal(other[name].float(), value), name


def test_one_tensor_alone_is_the_one_in_the_model() -> None:
    config = tiny_config()
    model = Model(config)
    initialise(model, seed=5)
    state = _state(model)
    for name, layout in parameter_layouts(config).items():
        alone = tensor_for(name, layout, config, 5)
        assert alone.dtype == torch.float32
        assert torch.equal(alone, state[name]), name


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    initialise(Model(tiny_config()), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_norms_are_1_biases_and_gates_0_and_all_else_normal() -> None:
    config = tiny_config(
        hidden_size=96, vocab_size=300, initializer_range=0.02, qk_norm=True, mixers="L S F L+S",
        branches=BranchConfig(merge=BranchMerge.learned),
    )  # fmt: skip
    model = Model(config)
    initialise(model, seed=5)
    for name, value in _state(model).items():
        if "norm" in name or "merge" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias") or "gate_up" in name:
            assert (value == 0).all(), name
        else:
            count = value.numel()
            assert abs(float(value.mean())) < 5 * 0.02 / math.sqrt(count), name
            assert float(value.std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * count)), name


def test_seeds_and_names_give_different_values() -> None:
    config = tiny_config()
    layouts = parameter_layouts(config)
    one, other = "blocks.0.mixer.k_proj.weight", "blocks.0.mixer.v_proj.weight"
    drawn = tensor_for(one, layouts[one], config, 5)
    assert not torch.equal(drawn, tensor_for(one, layouts[one], config, 6))
    assert not torch.equal(drawn, tensor_for(other, layouts[other], config, 5))


def test_a_fresh_gate_halves_the_state_every_16_tokens() -> None:
    model = Model(tiny_config())
    initialise(model, seed=5)
    mixer = model.blocks[0].mixer
    assert mixer is not None
    (branch,), x = mixer.branches, torch.randn(1, 3, 24)
    log_decay = branch.core.log_decay(branch.projections.project(x), x)
    assert_close((16 * log_decay).exp(), torch.full((1, 3, 2, 8), 0.5), relative=1e-6)


def test_a_meta_model_is_refused() -> None:
    with torch.device("meta"):
        model = Model(tiny_config())
    with pytest.raises(ValueError, match="must be on a device that holds data"):
        initialise(model, seed=5)


@pytest.mark.parametrize(("balance", "value"), [(Balance.bias, 0.0), (Balance.previous_step, 0.25)])
def test_routers_are_drawn_and_remember_an_even_load(balance: Balance, value: float) -> None:
    moe = ExpertConfig(num_experts=4, balance=balance)
    model = Model(tiny_config(hidden_size=96, initializer_range=0.02, ffns="e*4", moe=moe))
    initialise(model, seed=5)
    state = _state(model)
    (remembered,) = (
        v for name, v in state.items() if name.startswith("blocks.2.ffn.router.") and v.dim() == 1
    )
    assert remembered.tolist() == [value] * 4
    assert float(state["blocks.2.ffn.router.weight"].std()) == pytest.approx(0.02, rel=0.1)
    experts = state["blocks.2.ffn.experts.up_proj.weight"]
    assert float(experts.std()) == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(experts[0], experts[1])
