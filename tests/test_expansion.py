"""Expert upcycling of every family: same bits by both sinks, and the source within the result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert, grow
from tiny import assert_same_bits, dense_folder, load, logits_of, tensors_of
from tiny_moe import FAMILIES, moe_folder, moe_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusion_upcycle import expand_model
from fusion_upcycle.architectures import MOE_FAMILIES
from fusion_upcycle.conversion.output import OutputOptions
from fusion_upcycle.conversion.run import save_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.importance.scores import Importance
from fusion_upcycle.live.identity import folder_identity
from fusion_upcycle.live.routers import find_routers
from fusion_upcycle.verify import verify

families = pytest.mark.parametrize("family", FAMILIES)
FP32, BF16 = torch.float32, torch.bfloat16
NOISY = {"expert_init": "noise", "router_extension": "noise"}


def live(model: PreTrainedModel, mode: str = "none", **options: Any) -> PreTrainedModel:
    return expand_model(model, verify=mode, **options).model


def scores_of(folder: Path, scores: list[float]) -> Importance:
    """The same scores for each MoE layer."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    prefix = MOE_FAMILIES[family].router_name
    layers = [int(n.split(".")[2]) for n in tensors_of(folder) if n.endswith(prefix)]
    metrics = {"saliency": {layer: scores for layer in layers}}
    return Importance(metrics, 100, {"text": "none"}, folder_identity(folder), {})


def logits_with_only(
    model: PreTrainedModel, allowed: list[int], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """transformers' own forward pass; its routers can choose among these experts only."""
    routers = find_routers(model)
    masked = sorted(set(range(routers.num_experts)) - set(allowed))
    linear, inside = F.linear, []

    def masked_linear(*args: Any) -> Tensor:
        logits = linear(*args)
        if inside:
            logits[..., masked] = -torch.inf
        return logits

    monkeypatch.setattr(F, "linear", masked_linear)
    for bias in routers.selection_biases():  # sigmoid(-inf) is 0, which a bias could lift
        bias.data.view(-1)[masked] = -torch.inf
    for router in routers.modules.values():
        router.register_forward_pre_hook(lambda *_: inside.append(True))
        router.register_forward_hook(lambda *_: inside.clear())
    return logits_of(model)


@families
def test_the_source_is_within_the_result_which_loads(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = moe_folder(tmp_path / "moe", family)
    proof = grow(source, tmp_path / "out", num_experts=7, verify="auto", **NOISY).proof
    larger, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference, found = logits_of(load(source)), logits_of(larger.eval())
    difference = (found - reference).norm() / reference.norm()
    assert difference > 0.01  # top-k fixed does not keep the function, and the proof says how much
    assert proof.claim == "approximate" and proof.holds is None
    assert 0.2 < proof.function["relative"] / difference < 5  # of other tokens
    assert "top-k picks them together" in str(proof)
    # Independently of our proof.
    within = logits_with_only(larger, [0, 1, 2, 3], monkeypatch)
    assert (within - reference).abs().max() <= 1e-5 * reference.abs().max()


@families
def test_plain_copies_stand_in_for_their_originals(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = moe_folder(tmp_path / "moe", family)
    scores = scores_of(source, [1.0, 4.0, 0.5, 2.0])
    options = {"selection": "greedy", "metric": "saliency", "router_extension": "copy"}
    done = grow(source, tmp_path / "out", num_experts=7, scores=scores, **options)
    assert set(map(tuple, done.record["plan"].values())) == {(0, 1, 2, 3, 1, 3, 1)}
    within = logits_with_only(load(tmp_path / "out"), [0, 2, 5, 6], monkeypatch)
    reference = logits_of(load(source))
    assert (within - reference).abs().max() <= 1e-5 * reference.abs().max()


@families
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_as_many_experts_as_there_are_is_the_source_bit_for_bit(
    dtype: torch.dtype, family: str, tmp_path: Path
) -> None:
    source = moe_folder(tmp_path / "moe", family, dtype=dtype)
    options = NOISY | {"max_shard_size": "20KB", "verify": "auto"}
    proof = grow(source, tmp_path / "out", num_experts=4, **options).proof
    assert proof.holds and proof.claim == "exact"
    assert proof.tensors == {
        "bit_equal_to_source": len(tensors_of(source)),
        "bit_equal_to_second_draw": 0,
    }
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(source))
    assert load(tmp_path / "out").config.to_diff_dict() == load(source).config.to_diff_dict()


@families
@pytest.mark.parametrize("expert_init", ["copy", "svd"])
def test_the_live_model_has_the_bits_of_the_streamed_one(
    expert_init: str, family: str, tmp_path: Path
) -> None:
    options = {"multiplier": 2, "expert_init": expert_init}
    source = tmp_path / "moe"  # as transformers saves it, some tensors in float32
    load(moe_folder(tmp_path / "raw", family, dtype=BF16)).save_pretrained(source)
    grow(source, tmp_path / "out", **options)
    larger = live(load(source), "layers" if expert_init == "copy" else "none", **options)
    assert_same_bits(load(tmp_path / "out").state_dict(), larger.state_dict())
    larger.save_pretrained(tmp_path / "saved")
    assert_same_bits(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "out"))


@families
def test_originals_and_all_that_is_no_expert_stay_bit_for_bit(family: str, tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", family)
    grow(source, tmp_path / "out", num_experts=6, expert_init="drop")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for name, tensor in before.items():
        kept = after[name]
        for axis, size in enumerate(tensor.shape):  # the experts' axis is longer
            kept = kept.narrow(axis, 0, size)
        assert torch.equal(kept, tensor), name
    new, old = (load(folder).config.to_dict() for folder in (tmp_path / "out", source))
    changed = {field for field in new if new[field] != old[field]}
    names = {MOE_FAMILIES[family].experts_field, "num_local_experts"}  # the class chooses one
    assert changed - {"_name_or_path"} and changed <= names | {"_name_or_path"}


def test_a_kept_float32_tensor_of_a_half_precision_file_stays_as_the_file_has_it(
    tmp_path: Path,
) -> None:
    """A file may have ERNIE's router in bfloat16, though transformers would save float32."""
    source = moe_folder(tmp_path / "moe", "ernie4_5_moe", dtype=BF16)
    assert tensors_of(source)["model.layers.1.mlp.gate.weight"].dtype == BF16
    grow(source, tmp_path / "out", multiplier=2)
    assert tensors_of(tmp_path / "out")["model.layers.1.mlp.gate.weight"].dtype == BF16


def test_backbones_stay_backbones(tmp_path: Path) -> None:
    larger = live(moe_model("qwen3_moe", backbone=True), multiplier=2)
    assert type(larger).__name__ == "Qwen3MoeModel"
    assert larger.config.num_experts == 8


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "mixtral", tie_word_embeddings=True)
    grow(source, tmp_path / "out", multiplier=2)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert load(tmp_path / "out").config.tie_word_embeddings


def test_the_result_keeps_mode_and_generation_config_of_a_live_source() -> None:
    source = moe_model("mixtral").train()
    source.generation_config.max_length = 77
    larger = live(source, multiplier=2)
    assert larger.training and larger.generation_config.max_length == 77
    assert source.config.num_local_experts == 4  # not touched


def test_from_dense_to_an_moe_to_a_larger_moe(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", "llama")
    options = {"expert_init": "drop", "router_init": {"name": "normal", "std": 0.5}}
    convert(dense, tmp_path / "moe", **options)
    first = grow(tmp_path / "moe", tmp_path / "larger", num_experts=6)
    second = grow(tmp_path / "larger", tmp_path / "largest", multiplier=2)
    assert first.record["parameters"]["total"] == second.record["parameters"]["source"]
    largest = load(tmp_path / "largest")
    assert largest.config.num_local_experts == 12 and largest.config.num_experts_per_tok == 2
    assert second.record["parameters"]["total"] == largest.num_parameters()
    # The experts of the MoE are still there, and so is the whole plan, step by step.
    before, after = tensors_of(tmp_path / "moe"), tensors_of(tmp_path / "largest")
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    assert first.record["plan"]["1"] == [0, 1, 2, 3, 0, 1]
    assert torch.equal(after[name.format(11)], before[name.format(1)])
    for folder in ("moe", "larger", "largest"):
        assert verify(tmp_path / folder, progress=False).tensors


def test_a_copied_folder_of_dense_upcycling_loses_nothing_in_the_chain(tmp_path: Path) -> None:
    """With plain copies and zero routers everywhere the chain computes the dense function."""
    dense = dense_folder(tmp_path / "dense", "llama")
    convert(dense, tmp_path / "moe")
    grow(tmp_path / "moe", tmp_path / "larger", num_experts=7)
    reference = logits_of(load(dense))
    difference = (logits_of(load(tmp_path / "larger")) - reference).abs().max()
    assert difference <= 1e-4 * reference.abs().max()


def test_top_k_changes_only_when_asked(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "ernie4_5_moe")
    grow(source, tmp_path / "same", multiplier=2)
    assert load(tmp_path / "same").config.num_experts_per_tok == 2
    done = grow(source, tmp_path / "four", multiplier=2, experts_per_token=4, verify="auto")
    assert load(tmp_path / "four").config.num_experts_per_tok == 4
    assert "top-k is 4, and was 2" in str(done.proof)
    identity = grow(source, tmp_path / "three", num_experts=4, experts_per_token=3, verify="auto")
    assert identity.proof.claim == "approximate"


def test_doubling_experts_and_top_k_with_copies_keeps_a_renormalised_function(
    tmp_path: Path,
) -> None:
    """Both copies of each of the k best are picked: the same weights, by halves."""
    source = moe_folder(tmp_path / "moe", "mixtral")
    options = {"router_extension": "copy", "experts_per_token": 4, "verify": "auto"}
    done = grow(source, tmp_path / "out", multiplier=2, **options)
    assert done.proof.function["relative"] < 1e-5


def test_noise_on_the_selection_bias(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "deepseek_v3")
    grow(source, tmp_path / "out", multiplier=2, router_extension="bias")
    found = tensors_of(tmp_path / "out")
    rows = found["model.layers.1.mlp.gate.weight"]
    bias = found["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(rows[4:], rows[:4])
    change = bias[4:] - bias[:4]
    assert 0 < change.abs().max() < 0.05 * bias[:4].std()


def test_given_router_rows_win_over_the_option(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "glm4_moe", dtype=BF16)
    rows, biases = torch.randn(6, 32), torch.randn(6)
    done = grow(
        source,
        tmp_path / "out",
        num_experts=6,
        router_extension="split",
        router_rows={1: rows},
        selection_biases={1: biases},
        verify="auto",
    )
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["model.layers.1.mlp.gate.weight"], rows.to(BF16))
    bias = found["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, biases.to(bias.dtype))
    assert done.proof.details["restricted"]["max_abs"] == 0
    assert "only nearly" in str(done.proof)
    # A second proof takes them from the folder, and says of what kind they are.
    again = verify(tmp_path / "out", progress=False)
    assert again.tensors == done.proof.tensors and again.tensors["router_rows_as_given"] == 2


def test_scores_are_of_the_model_that_they_are_used_for(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "mixtral")
    other = moe_folder(tmp_path / "other", "mixtral", seed=1)
    scores = scores_of(source, [1.0, 4.0, 0.5, 2.0])
    options = {"num_experts": 6, "selection": "greedy", "metric": "saliency"}
    done = grow(source, tmp_path / "out", scores=scores.save(tmp_path / "scores"), **options)
    assert done.record["plan"]["0"] == [0, 1, 2, 3, 1, 1]
    assert done.record["importance"]["metric"] == "saliency"
    with pytest.raises(UpcyclingError, match="importance scores are of"):
        grow(other, tmp_path / "wrong", scores=scores, **options)
    with pytest.raises(UpcyclingError, match="have no load"):
        grow(source, tmp_path / "wrong", scores=scores, **options | {"metric": "load"})
    made = expand_model(load(source), scores=scores, verify="none", **options)
    assert made.expansion.plan.to_json() == done.record["plan"]
    with pytest.raises(UpcyclingError, match="importance scores are of"):
        expand_model(load(other), scores=scores, **options)


def test_a_live_expansion_is_saved_as_a_streamed_one_is_written(tmp_path: Path) -> None:
    source = moe_folder(tmp_path / "moe", "granitemoe")
    options = {"num_experts": 7, "expert_init": "noise"}
    grow(source, tmp_path / "out", **options)
    made = expand_model(load(source), verify="logits", **options)
    done = save_model(
        made.expansion,
        made.proof,
        tmp_path / "saved",
        sources={"moe": {"name": "moe", "from_hub": False}},
        companions=lambda folder: [],
        options=OutputOptions(progress=False),
    )
    assert_same_bits(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "out"))
    assert done.record["num_experts"] == {"before": 4, "after": 7}
    assert verify(tmp_path / "saved", source, progress=False).tensors == made.proof.tensors
