"""Expansion of live models that are not what they seem, and of folders whose run was cut short."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_bits, files_of, tensors_of
from tiny_moe import moe_folder, moe_model

from fusion_upcycle import expand, expand_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion import expansion


def test_a_live_model_that_is_not_loaded_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="meta device"):
        expand_model(moe_model("mixtral").to("meta"))
    with pytest.raises(UpcyclingError, match="meta device"):  # before the text is looked at
        expand_model(moe_model("mixtral").to("meta"), calibration={"a": "nowhere"})


def test_parts_that_the_class_does_not_have_are_not_lost_in_silence() -> None:
    adapted = moe_model("mixtral")
    adapted.model.layers[0].mlp.adapter = torch.nn.Linear(3, 3, bias=False)
    with pytest.raises(UpcyclingError, match=r"mlp\.adapter\.weight.*merge_and_unload"):
        expand_model(adapted)
    buffered = moe_model("mixtral")
    buffered.register_buffer("calls", torch.zeros(1))
    with pytest.raises(UpcyclingError, match="has calls, for which MixtralForCausalLM has no"):
        expand_model(buffered)


def test_what_is_no_model_or_has_another_models_config_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="Sequential is no model of transformers"):
        expand_model(torch.nn.Sequential(moe_model("mixtral")))  # type: ignore[arg-type]
    other = moe_model("mixtral")
    other.config.num_local_experts = 5
    with pytest.raises(UpcyclingError, match=r"\[5, .* but it is \[4, .*of another model"):
        expand_model(other)
    with pytest.raises(UpcyclingError, match=r"scores=\{0: .*importance\.json"):
        expand_model(moe_model("mixtral"), selection="greedy", scores={0: [1]})  # type: ignore[arg-type]


def test_parameters_may_lie_in_memory_as_they_like() -> None:
    model, made = moe_model("mixtral"), expand_model(moe_model("mixtral"), num_experts=6).model
    experts = model.model.layers[0].mlp.experts
    moved = experts.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    experts.down_proj = torch.nn.Parameter(moved)
    assert_same_bits(expand_model(model, num_experts=6).model.state_dict(), made.state_dict())


def test_only_the_same_expansion_goes_on_with_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = moe_folder(tmp_path / "moe", "mixtral"), tmp_path / "out"
    options: dict[str, Any] = {"num_experts": 6, "max_shard_size": "30KB", "progress": False}
    before = files_of(tmp_path)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def start() -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(expansion, "prove_expansion", interrupt)
            expand(source, output, overwrite=True, **options)

    start()
    left = files_of(tmp_path)
    assert before.items() <= left.items() and not output.exists()
    assert all(name.startswith(".out.incomplete/") for name in left.keys() - before.keys())
    expected = {}
    for seed in (0, 1):
        expand(source, tmp_path / f"seed{seed}", seed=seed, **options)
        expected[seed] = tensors_of(tmp_path / f"seed{seed}")
    for seed in (0, 1):
        start()  # what Ctrl-C leaves is what a kill does
        shard = next((tmp_path / ".out.incomplete").glob("model-00001*"))
        written = shard.stat().st_mtime_ns
        done = expand(source, output, seed=seed, overwrite=True, **options)
        assert_same_bits(tensors_of(output), expected[seed])
        resumed = (output / shard.name).stat().st_mtime_ns == written
        assert resumed == (seed == 0), done.record["options"]
