"""AdamW's moments follow the plan of the parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import grow
from tiny import assert_same_bits, load, tensors_of, token_ids
from tiny_moe import FAMILIES, moe_folder
from transformers import PreTrainedModel

from fusion_upcycle.architectures import MOE_FAMILIES
from fusion_upcycle.checkpoint import digests
from fusion_upcycle.checkpoint.digests import digest
from fusion_upcycle.checkpoint.moments import MOMENTS_FILE, Moments, read_moments, write_moments
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.live import expand_model
from fusion_upcycle.training.moments import load_moments, place_moments


def optimizer_of(model: PreTrainedModel) -> torch.optim.AdamW:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*named, strict=True)
    return torch.optim.AdamW([{"params": parameters, "names": names}], lr=1e-3)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        model(token_ids(), labels=token_ids(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def moments_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Moments:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}


def trained(folder: Path, family: str) -> Path:
    """A folder with weights after three steps, and their moments."""
    model = load(moe_folder(folder / "fresh", family))
    optimizer = optimizer_of(model)
    step(model, optimizer, 3)
    model.save_pretrained(folder / "trained")
    write_moments(moments_of(model, optimizer), folder / "trained")
    return folder / "trained"


def flat(moments: Moments) -> dict[str, torch.Tensor]:
    return {f"{n}/{kind}": value for n, values in moments.items() for kind, value in values.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_moments_expand_alike(family: str, tmp_path: Path) -> None:
    """What holds the weight of an expert twice holds its moments twice, in every family."""
    source = trained(tmp_path, family)
    options: dict[str, Any] = {"num_experts": 6, "router_extension": "copy"}
    grow(source, tmp_path / "out", optimizer_state=source, **options)
    before, after = load(source), load(tmp_path / "out")
    grown = load_moments(tmp_path / "out", after, None)  # of this model, as training checks
    assert grown.keys() == read_moments(source).keys()
    # The moments as if they were weights: expanded in the same way as these.
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = read_moments(source)
        state = before.state_dict()
        for name, values in moments.items():
            state[name].copy_(values[kind])
        options = {"num_experts": 6, "router_extension": "copy"}
        larger = expand_model(before, verify="none", **options).model
        for name, values in grown.items():
            assert torch.equal(larger.state_dict()[name], values[kind]), (name, kind)


def test_as_many_experts_as_there_are_is_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained(tmp_path, "qwen2_moe")
    read: list[str] = []
    monkeypatch.setattr(digests, "digest", lambda path: (read.append(path.name), digest(path))[1])
    for new in ("copy", "reset", "scale"):
        output = tmp_path / new
        options = {"num_experts": 4, "optimizer_state": source, "new_moments": new}
        done = grow(source, output, **options)
        assert_same_bits(flat(read_moments(output)), flat(read_moments(source)))
        assert_same_bits(tensors_of(output), tensors_of(source))
        assert done.record["optimizer_state"]["new_moments"] == new
        # Hashed while it was written, and rightly.
        assert Path(MOMENTS_FILE).name not in read and "config.json" in read
        assert done.record["files"][MOMENTS_FILE] == digest(output / MOMENTS_FILE)


def test_folders_give_what_one_process_gives(tmp_path: Path) -> None:
    """Train, expand parameters and state together, train on: bit for bit the same."""
    source = trained(tmp_path, "mixtral")
    options: dict[str, Any] = {"num_experts": 7, "expert_init": "noise"}
    grow(source, tmp_path / "out", optimizer_state=source, **options)
    by_folder = load(tmp_path / "out")
    state = load_moments(tmp_path / "out", by_folder, None)
    place_moments(optimizer := optimizer_of(by_folder), state)
    step(by_folder, optimizer, 2)

    model = load(source)
    made = expand_model(model, verify="none", **options)
    places = {layer: list(plan) for layer, plan in made.expansion.plan.source_experts.items()}
    moments = read_moments(source)
    for name, values in moments.items():
        if ".mlp." in name:  # experts and routers: one entry for each expert
            for kind in ("exp_avg", "exp_avg_sq"):
                values[kind] = values[kind][places[int(name.split(".")[2])]]
    in_memory = made.model
    place_moments(optimizer := optimizer_of(in_memory), moments)
    step(in_memory, optimizer, 2)
    assert_same_bits(by_folder.state_dict(), in_memory.state_dict())


def test_new_moments_of_copies(tmp_path: Path) -> None:
    source = trained(tmp_path, "mixtral")
    moments = read_moments(source)

    def expanded(new: str) -> Moments:
        output = tmp_path / new
        made = grow(source, output, num_experts=10, optimizer_state=source, new_moments=new)
        assert made.record["plan"]["0"] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
        return read_moments(output)

    name = "model.layers.1." + MOE_FAMILIES["mixtral"].experts_module + ".down_proj"
    reset, scaled = expanded("reset")[name], expanded("scale")[name]
    for kind, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        old = moments[name][kind]
        assert torch.equal(reset[kind][:4], old) and not reset[kind][4:].any()
        assert torch.equal(scaled[kind][:4], old)
        torch.testing.assert_close(scaled[kind][8], old[0] / 3**power)
        torch.testing.assert_close(scaled[kind][7], old[3] / 2**power)
    assert torch.equal(scaled["step"], moments[name]["step"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"new_moments": "half"}, "Unknown new_moments 'half'"),
        ({"expert_init": "permute"}, "new_moments=.reset"),
        ({"optimizer_state": "nowhere"}, "nowhere has no training/optimizer"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    source = trained(tmp_path, "mixtral")
    with pytest.raises(UpcyclingError, match=match):
        grow(source, tmp_path / "out", **{"optimizer_state": source} | options)
    assert not (tmp_path / "out").exists()


def test_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    source = trained(tmp_path, "mixtral")
    other = trained(tmp_path / "other", "qwen3_moe")
    with pytest.raises(UpcyclingError, match=r"The moments are of another model"):
        grow(source, tmp_path / "out", optimizer_state=other)
    assert (other / MOMENTS_FILE).is_file() and not (tmp_path / "out").exists()
