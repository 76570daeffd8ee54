"""What is heard of a live model and known of it from outside."""

import pytest
import torch
from tiny import dense_model
from tiny_moe import FAMILIES, moe_model
from torch import Tensor

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.experts import expert_parameters, find_experts
from fusion_upcycle.live.identity import state_sha256
from fusion_upcycle.live.inputs import logits_of_last
from fusion_upcycle.live.modes import evaluating
from fusion_upcycle.live.routers import find_routers, hearing_inputs

IDS = torch.arange(12).view(2, 6)


@torch.no_grad()
def test_inputs_are_heard_as_each_layer_is_given_them() -> None:
    model = moe_model("mixtral")
    expected = model(IDS, output_hidden_states=True).hidden_states[0].flatten(0, -2)
    heard: dict[int, Tensor] = {}
    with hearing_inputs(dict(enumerate(model.model.layers)), heard.__setitem__):
        model(IDS)
    assert list(heard) == [0, 1]
    assert torch.equal(heard[0], expected) and not torch.equal(heard[1], expected)


def test_nothing_is_heard_after_the_block_even_if_it_failed() -> None:
    model = moe_model("mixtral")
    routers = find_routers(model)
    routers.close()
    heard: list[int] = []
    with pytest.raises(RuntimeError), hearing_inputs(routers.modules, lambda i, _: heard.append(i)):
        raise RuntimeError
    model(IDS)
    assert not heard
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_logits_of_the_last_tokens_only_where_there_are_logits() -> None:
    model = dense_model()
    assert model(IDS, **logits_of_last(model, 2)).logits.shape[1] == 2
    assert model.model(IDS, **logits_of_last(model.model, 2)).last_hidden_state.shape[1] == 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", [False, True])
def test_experts_are_found_in_every_family_by_name(family: str, backbone: bool) -> None:
    model = moe_model(family, backbone=backbone)
    routers = find_routers(model)
    found = expert_parameters(model, routers)
    prefix = "" if backbone else "model."
    assert found.keys() == routers.modules.keys() == find_experts(model, routers).keys()
    for layer, parameters in found.items():
        names = moe_family(model.config).packed_names
        assert set(parameters) == {f"{prefix}layers.{layer}.{name}" for name in names}
        for name, parameter in parameters.items():
            assert parameter is model.get_parameter(name)
            assert len(parameter) == 4


def test_a_dense_model_has_no_experts() -> None:
    model = dense_model()
    assert not find_experts(model, find_routers(model))


def test_experts_that_are_not_where_they_should_be_are_missed_by_layer() -> None:
    model = moe_model("mixtral")
    routers = find_routers(model)
    del model.model.layers[1].mlp.experts
    with pytest.raises(UpcyclingError, match=r"routers in layers \[0, 1\] but experts.* in \[0\]"):
        find_experts(model, routers)


def test_the_digest_of_a_state_tells_weights_names_and_settings_apart() -> None:
    digest = state_sha256(dense_model(), "a")
    assert state_sha256(dense_model(), "a") == digest
    assert state_sha256(dense_model(), "b") != digest
    assert state_sha256(dense_model(seed=1), "a") != digest
    assert state_sha256(dense_model().model, "a") != digest
    assert state_sha256(dense_model().bfloat16(), "a") == digest
    changed = dense_model()
    with torch.no_grad():
        changed.lm_head.weight[0, 5] *= 1.1
    assert state_sha256(changed, "a") != digest


def test_evaluating_gives_back_each_modules_mode_and_the_experts_code() -> None:
    model = moe_model("mixtral").train()
    model.model.layers[0].eval()
    model.config._experts_implementation = "batched_mm"
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model, experts="eager"):
        assert not any(module.training for module in model.modules())
        assert model.config._experts_implementation == "eager"
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes
    assert model.config._experts_implementation == "batched_mm"
    with evaluating(model):
        assert model.config._experts_implementation == "batched_mm"
