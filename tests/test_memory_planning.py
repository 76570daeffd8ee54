"""`inspect --gpus`: what training takes, against models and steps that are really there."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import dense_model
from tiny_training import moe_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, ViTConfig

from fusion_upcycle.cli import main
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.activations import trace_activations
from fusion_upcycle.inspection.gpus import memory_table
from fusion_upcycle.inspection.memory import USABLE, Planner, Way

BATCH, LENGTH = 2, 48


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = moe_model("qwen3_moe")
    made.config.architectures = [type(made).__name__]
    return made


@pytest.fixture(scope="module")
def planner(model: PreTrainedModel) -> Planner:
    return Planner(model.config, BATCH, LENGTH)


def largest_part(model: PreTrainedModel, gpus: int) -> int:
    """Of the first process, as FSDP2 cuts: on the first axis, or experts on their last."""
    total = 0
    for name, parameter in model.named_parameters():
        axis = 2 if ".experts." in name and parameter.shape[0] % gpus else 0
        total += parameter.chunk(gpus, axis)[0].numel()
    return total


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
def test_parameters_are_those_of_the_process_that_has_most(
    model: PreTrainedModel, planner: Planner, gpus: int
) -> None:
    found = planner.memory(gpus, Way("fsdp"))
    assert found.parameters == largest_part(model, gpus)
    assert found.weights == 4 * found.parameters
    assert planner.memory(gpus, Way("ddp")).parameters == model.num_parameters()


def kept_by_a_step(model: PreTrainedModel) -> int:
    """Bytes of all storages but weights' that a real forward pass keeps."""
    weights = {tensor.data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.train()(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, -2).float(), ids.flatten())
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    loss.backward()
    return found


def test_activations_are_those_of_a_real_step(model: PreTrainedModel) -> None:
    found = trace_activations(model.config, BATCH, LENGTH)
    real = kept_by_a_step(copy.deepcopy(model).bfloat16())
    assert sum(found.layers) + found.ends == pytest.approx(real, rel=0.001)
    assert found.inputs == BATCH * LENGTH * model.config.hidden_size * 2
    twice = trace_activations(model.config, 2 * BATCH, LENGTH)
    assert sum(twice.layers) == pytest.approx(2 * sum(found.layers), rel=0.02)
    assert found.peak(checkpointing=True) < found.peak(checkpointing=False)


def test_ways_are_those_that_training_takes(planner: Planner) -> None:
    assert planner.ways(2) == [Way("fsdp"), Way("fsdp", 2)]  # ddp is refused, see check_fit
    dense = dense_model(vocab_size=257)
    dense.config.architectures = [type(dense).__name__]
    planner = Planner(dense.config, BATCH, LENGTH)
    assert planner.ways(2) == [Way("ddp"), Way("fsdp")]
    for gpus, each in ((1, 2), (2, 2 + 4)):  # autocast's copies; and the buckets of gradients
        assert planner.memory(gpus, Way("ddp")).transient == each * dense.num_parameters()


def test_the_smallest_number_fits_and_the_one_before_does_not(planner: Planner) -> None:
    one = planner.memory(1, Way("fsdp")).total(checkpointing=False)
    eight = planner.memory(8, Way("fsdp"))
    between = int((one + eight.total(checkpointing=False)) / 2 / USABLE)
    found = planner.smallest(Way("fsdp"), between, checkpointing=False)
    assert found in (2, 4, 8)
    assert planner.memory(found, Way("fsdp")).fits(between, checkpointing=False)
    assert not planner.memory(found // 2, Way("fsdp")).fits(between, checkpointing=False)
    assert planner.smallest(Way("ddp"), int(one / 2), checkpointing=True) is None
    dealt = planner.memory(8, Way("fsdp", 4))
    assert (dealt.parameters, dealt.activations) == (eight.parameters, eight.activations)
    assert dealt.transient < eight.transient


def inspect(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    main(["inspect", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_config_alone_is_enough(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_diff_dict(), default=str))
    said = inspect(capsys, tmp_path, "--gpus", 8, "--memory", "80GB", "--context-length", LENGTH)
    assert "Qwen3MoeForCausalLM" in said and "fits on 8 GPUs: strategy=fsdp" in said
    assert "EP 4" in said
    arguments = (tmp_path, "--memory", "80GB", "--context-length", LENGTH)
    said = inspect(capsys, *arguments, "--gpus", 7)
    assert "cannot be divided evenly among 7 processes. Start" in " ".join(said.split())
    said = inspect(capsys, *arguments[:1], "--memory", "1KB", "--gpus", 8)
    assert "fits on no number of such GPUs" in " ".join(said.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "8"), "add --memory 80GB"),
        (("--memory", "80GB"), "add --gpus 64"),
        (("--gpus", "8", "--memory", "much"), "memory='much' is not a size"),
        (("--gpus", "0", "--memory", "80GB"), "gpus=0"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        inspect(capsys, "--recipe", "mixtral_8x7b", *arguments)
    assert words in capsys.readouterr().err


def test_a_model_that_is_no_decoder_is_refused() -> None:
    config = ViTConfig(architectures=["ViTForImageClassification"])
    with pytest.raises(UpcyclingError, match="planned for decoders"):
        memory_table(config, 8, 10**9, context_length=8)
