"""Expert choice, hash routing, shared experts and shards of our own class: against the formula."""

import copy
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_families as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import files_of, tensors_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSeq2SeqLM

import fusion_upcycle.models as models
from fusion_upcycle import upcycle
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.models.modeling_sparse import SparseMLP
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_model
from fusion_upcycle.verify import verify


def convert(folder: Path, model_type: str, of: torch.dtype = torch.float64, /, **options: Any):
    """A tiny dense model, its MoE's folder, and the MoE."""
    dense = tiny.dense(model_type).to(of)
    dense.save_pretrained(folder / "dense")
    dense = type(dense).from_pretrained(folder / "dense", dtype=of).eval()
    given = {"num_experts": 4, "experts_per_token": 2, "verify": "layers", "progress": False}
    made = upcycle(folder / "dense", folder / "moe", **given | options)
    return dense, made, load(made.output, dense)


def load(folder: Path, dense: Any) -> Any:
    kind: Any = models.model_class(type(dense))
    return kind.from_pretrained(folder, dtype=dense.dtype, experts_implementation="eager").eval()


def difference(a: Any, b: Any, **given: Tensor) -> float:
    return (tiny.output(a, **given) - tiny.output(b, **given)).abs().max().item()


def shake(model: Any, seed: int = 5) -> list[SparseMLP]:
    """Move experts and routers apart."""
    torch.manual_seed(seed)
    blocks = [module for module in model.modules() if isinstance(module, SparseMLP)]
    for block in blocks:
        for name, parameter in block.named_parameters():
            if "act_fn" not in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return blocks


def watch(block: SparseMLP) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []
    block.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    return seen


# --- expert choice ------------------------------------------------------------------------------


def by_hand(
    block: SparseMLP, x_BTD: Tensor, mask_BT: Tensor | None, *, capacity: float, sequence: bool
) -> Tensor:
    """Each expert takes its best tokens; a token gets the weighted mean of those that took it."""
    groups = x_BTD if sequence else x_BTD.flatten(0, 1)[None]
    masks = torch.ones(groups.shape[:2]) if mask_BT is None else mask_BT.view(groups.shape[:2])
    result = torch.zeros_like(groups)
    for group, mask, output in zip(groups, masks, result, strict=True):
        scores = (group @ block.gate.weight.T).softmax(-1) * mask[:, None]
        count = min(len(group), math.ceil(capacity * len(group) / block.num_experts))
        total = torch.zeros(len(group), dtype=group.dtype)
        for expert in range(block.num_experts):
            for token in scores[:, expert].argsort(descending=True)[:count].tolist():
                weight = scores[token, expert]
                output[token] += weight * block.experts.one(expert, group[token][None])[0]
                total[token] += weight
        if block.gate.normalised:
            output[total > 0] /= total[total > 0][:, None]
    return result.view_as(x_BTD)


@pytest.mark.parametrize("group", ["batch", "sequence"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_expert_choice_is_the_formula(
    tmp_path: Path, group: str, normalised: bool, padded: bool
) -> None:
    _, _, moe = convert(
        tmp_path,
        "bert",
        routing="expert_choice",
        capacity_factor=1.5,
        routing_group=group,
        normalize_topk_prob=normalised,
    )
    blocks = shake(moe)
    seen = [watch(block) for block in blocks]
    given, mask = tiny.inputs(moe, rows=3), None
    if padded:
        mask = torch.ones_like(given["input_ids"])
        mask[0, 4:], mask[2, 9:] = 0, 0
        given["attention_mask"] = mask
    tiny.output(moe, **given)
    for block, [(x, output)] in zip(blocks, seen, strict=True):
        expected = by_hand(block, x, mask, capacity=1.5, sequence=group == "sequence")
        size = expected.abs().max()
        assert (output - expected).abs().max() <= 1e-12 * max(1, size)
        assert (output - 1.001 * expected).abs().max() > 1e-4 * size
    if padded:
        other = given | {"input_ids": given["input_ids"].masked_fill(mask == 0, 7)}
        kept = (tiny.output(moe, **given) - tiny.output(moe, **other))[mask == 1]
        assert kept.abs().max() < 1e-12  # what stands in the padding is nobody's business


def test_expert_choice_is_exact_where_every_expert_takes_all(tmp_path: Path) -> None:
    dense, made, moe = convert(
        tmp_path, "vit", routing="expert_choice", capacity_factor=4, expert_init="permute"
    )
    assert made.proof.holds and made.proof.claim == "exact"
    assert difference(dense, moe, **tiny.inputs(dense)) < 1e-12


def test_the_proof_says_whom_expert_choice_leaves_out(tmp_path: Path) -> None:
    _, made, _ = convert(tmp_path / "one", "vit", routing="expert_choice", capacity_factor=1)
    layers = made.record["proof"]["layers"]
    assert made.proof.claim == "approximate" and made.proof.holds is None
    assert made.record["proof"]["function"]["kl_nats"] > 1e-6
    assert 0.05 < max(layers["unchosen"].values()) < 0.6
    assert layers["within_tolerance"] and layers["worst_layer_max_abs"] < 1e-12
    enough = layers["smallest_capacity"]
    assert 1 < enough <= 4
    assert verify(made.output, progress=False, mode="layers").to_json()["layers"] == layers
    more, less = (
        convert(tmp_path / name, "vit", routing="expert_choice", capacity_factor=c)[1].record
        for name, c in (("enough", enough), ("less", enough - 0.3))
    )
    # Behind the first layer inputs are others, where other tokens were left out before.
    assert more["proof"]["layers"]["unchosen"]["0"] == 0
    assert any(less["proof"]["layers"]["unchosen"].values())


def test_a_wrong_expert_is_found_behind_expert_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens may be left out, but what experts make of the others must be the dense function."""
    from fusion_upcycle.upcycling import upcycling as module

    original = module.Upcycling.with_copied_experts
    monkeypatch.setattr(
        module.Upcycling,
        "with_copied_experts",
        lambda self: original(module.replace(self, rules=_swapped(self.rules))),
    )
    with pytest.raises(UpcyclingError, match="exact"):
        convert(tmp_path, "vit", routing="expert_choice", capacity_factor=1)


def _swapped(rules: Any) -> Any:
    first, other = (n for n in rules if n.endswith("mlp.experts.1.up_proj.weight"))
    return rules | {first: rules[other], other: rules[first]}


def test_expert_choice_in_a_decoder_is_refused(tmp_path: Path) -> None:
    for model_type in ("gpt2", "llama"):
        with pytest.raises(UpcyclingError, match=f"which a {model_type} must not see"):
            convert(tmp_path, model_type, routing="expert_choice")
    with pytest.raises(UpcyclingError, match=r"mixtral knows token_choice alone.*target=.sparse"):
        convert(tmp_path, "llama", routing="hash", target="mixtral")
    moe = convert(tmp_path / "bert", "bert")[2]
    moe.config.is_decoder, moe.config.moe_routing = True, "expert_choice"
    with pytest.raises(ValueError, match="expert choice sees the whole text, and bert must not"):
        type(moe)(moe.config)


def test_the_decoder_of_a_t5_stays_at_token_choice(tmp_path: Path) -> None:
    dense, made, moe = convert(tmp_path, "t5", routing="expert_choice", capacity_factor=4)
    blocks = [module for module in moe.modules() if isinstance(module, SparseMLP)]
    assert [block.routing for block in blocks] == ["expert_choice"] * 2 + ["token_choice"] * 2
    assert made.proof.holds
    assert difference(dense, moe, **tiny.inputs(dense)) < 1e-11
    # Token by token, with and without a cache, as the whole.
    ids = tiny.inputs(moe)["input_ids"]
    a, b = (moe.generate(ids, max_new_tokens=6, use_cache=cache) for cache in (True, False))
    assert torch.equal(a, b)


# --- hash ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "bert"])
def test_hash_routing_goes_by_the_token(tmp_path: Path, model_type: str) -> None:
    dense, made, moe = convert(tmp_path, model_type, routing="hash", expert_init="permute")
    assert made.proof.holds
    given = tiny.inputs(dense)
    assert difference(dense, moe, **given) < 1e-11
    assert not any(".gate." in name for name in tensors_of(made.output))
    tables = {n: t for n, t in tensors_of(made.output).items() if n.endswith("hash_table")}
    for table in tables.values():
        assert table.shape == (tiny.VOCABULARY, 2) and table.dtype == torch.int64
        assert (table[:, 0] != table[:, 1]).all()
        assert table[:, 0].bincount(minlength=4).tolist() == [tiny.VOCABULARY // 4] * 4
    first, *others = tables.values()
    assert not any(torch.equal(first, other) for other in others)
    blocks = shake(moe)
    seen = watch(blocks[0])
    tiny.output(moe, **given)
    [(x, output)] = seen
    experts = blocks[0].hash_table[given["input_ids"]]
    for row in range(2):
        for token in (0, 5):
            e, f = experts[row, token].tolist()
            expected = sum(blocks[0].experts.one(i, x[row, token][None])[0] for i in (e, f)) / 2
            assert (output[row, token] - expected).abs().max() < 1e-12


def test_hash_routing_needs_token_ids(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="hash"):
        convert(tmp_path, "vit", routing="hash")
    _, _, moe = convert(tmp_path / "gpt2", "gpt2", routing="hash")
    with pytest.raises(ValueError, match="give the model input_ids"):
        moe(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))
    generated = moe.generate(tiny.inputs(moe)["input_ids"], max_new_tokens=5)
    assert generated.shape[1] == tiny.LENGTH + 5


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("bert", {"routing": "expert_choice", "capacity_factor": 1}),
        ("gpt2", {"routing": "hash"}),
        ("gemma2", {"expert_init": "noise", "target": "sparse"}),
    ],
)
def test_checkpointed_gradients_are_the_plain_ones(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    """The backward pass runs a layer again, with what its forward pass was given."""
    _, _, moe = convert(tmp_path, model_type, **options)
    given = tiny.inputs(moe)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][1, 6:] = 0
    gradients = []
    for checkpointed in (False, True):
        model = copy.deepcopy(moe).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of dropout
        loss = model(**given).logits.square().mean()
        other = given | {"input_ids": given["input_ids"].flip(0)}
        with torch.no_grad():
            model(**other)  # what another pass was given does not count
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "bert", "vit"])
def test_grouped_and_eager_experts_have_the_same_gradients(tmp_path: Path, model_type: str) -> None:
    _, _, moe = convert(tmp_path, model_type, torch.float32, target="sparse", expert_init="noise")
    gradients = []
    for how in ("eager", "batched_mm", "grouped_mm"):
        model = copy.deepcopy(moe)
        model.set_experts_implementation(how)
        tiny_output = model(**tiny.inputs(moe))
        tiny_output.logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for others in gradients[1:]:
        for name, gradient in gradients[0].items():
            size = gradient.abs().max()
            assert (gradient - others[name]).abs().max() <= 1e-4 * size + 1e-7, name


# --- options, sinks and folders -----------------------------------------------------------------

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("vit", {"granularity": 2, "shared_expert": "copy"}),
    ("gpt2", {"shared_expert": "copy", "shared_expert_intermediate_size": 72}),
    ("t5", {"moe_layers": {"encoder": "last_1", "decoder": [0]}, "shared_expert": "zero"}),
    ("gemma2", {"moe_layers": [1], "router_scores": "sigmoid"}),
    ("modernbert", {"moe_layers": "last_1", "granularity": 2}),
    ("bert", {"normalize_topk_prob": False, "router_init": "zeros"}),
    ("gpt_neox", {"expert_init": "subset", "experts_per_token": 4, "router_init": "zeros"}),
]


@pytest.mark.parametrize(("model_type", "options"), OPTIONS, ids=str)
def test_options_keep_the_function(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    dense, made, moe = convert(tmp_path, model_type, target="sparse", **options)
    assert difference(dense, moe, **tiny.inputs(dense)) < 1e-11
    assert verify(made.output, progress=False, mode="layers").mode == "layers"
    live, _ = to_model(
        plan_model(
            dense,
            make_options(
                num_experts=4, **{"experts_per_token": 2} | {"target": "sparse"} | options
            ),
        ),
        dense,
        verify="none",
    )
    assert type(live) is type(moe)
    for name, tensor in moe.state_dict().items():
        assert torch.equal(tensor, live.state_dict()[name]), name


@pytest.mark.parametrize("expert_init", ["noise", "drop", "svd", "qwen2", "permute"])
@pytest.mark.parametrize("model_type", ["vit", "t5"])
def test_initialisers_stream_the_bits_of_the_live_model(
    tmp_path: Path, model_type: str, expert_init: str
) -> None:
    more = {"expert_intermediate_size": 32} if expert_init == "qwen2" else {}
    dense, _, moe = convert(tmp_path, model_type, torch.float32, expert_init=expert_init, **more)
    options = make_options(num_experts=4, experts_per_token=2, expert_init=expert_init, **more)
    live, _ = to_model(plan_model(dense, options), dense, verify="layers")
    for name, tensor in moe.state_dict().items():
        assert torch.equal(tensor, live.state_dict()[name]), name


def test_twelve_experts_lie_in_shards_in_their_order(tmp_path: Path) -> None:
    dense, made, moe = convert(
        tmp_path,
        "bert",
        num_experts=12,
        experts_per_token=3,
        expert_init="permute",
        max_shard_size=20_000,
    )
    assert len(list(made.output.glob("*.safetensors"))) > 5
    assert difference(dense, moe, **tiny.inputs(dense)) < 1e-12
    blocks = [module for module in moe.modules() if isinstance(module, SparseMLP)]
    files = tensors_of(made.output)
    for expert in (2, 10, 11):
        name = f"bert.encoder.layer.1.intermediate.experts.{expert}.up_proj.weight"
        assert torch.equal(files[name], blocks[1].experts.up_proj[expert])


@pytest.mark.parametrize("change", ["one less", "one more"])
def test_a_folder_with_another_number_of_experts_does_not_load(tmp_path: Path, change: str) -> None:
    dense, made, _ = convert(tmp_path, "vit")
    file = made.output / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".0.mlp.experts.3." in name]:
        if change == "one less":
            del tensors[name]
        else:
            tensors[name.replace("experts.3.", "experts.4.")] = tensors[name].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RuntimeError):
        load(made.output, dense)


def test_labels_of_a_classifier_are_kept(tmp_path: Path) -> None:
    dense = tiny.dense("vit").float()
    dense.config.id2label = {i: f"animal {i}" for i in range(5)}
    dense.config.label2id = {f"animal {i}": i for i in range(5)}
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", progress=False)
    moe = AutoModelForImageClassification.from_pretrained(tmp_path / "moe")
    assert moe.config.id2label == dense.config.id2label
    assert type(moe).__name__ == "SparseViTForImageClassification"


def test_a_head_of_its_own_stays_untied(tmp_path: Path) -> None:
    """T5 1.1's: transformers says that it is tied, and keeps it where the file has one."""
    dense = tiny.dense("t5").float()
    dense.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors["lm_head.weight"] = 0.3 * torch.randn_like(tensors["shared.weight"])
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    dense = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense").eval()
    assert not torch.equal(dense.lm_head.weight, dense.shared.weight)
    for how in ("layers", "logits"):
        made = upcycle(
            tmp_path / "dense", tmp_path / how, verify=how, expert_init="permute", progress=False
        )
        moe = AutoModelForSeq2SeqLM.from_pretrained(made.output).eval()
        assert difference(dense, moe, **tiny.inputs(dense)) < 1e-4
    options = make_options(num_experts=4, experts_per_token=2)
    live, proof = to_model(plan_model(dense, options), dense, verify="logits")
    assert proof.holds and not torch.equal(live.lm_head.weight, live.shared.weight)
    assert difference(dense, live, **tiny.inputs(dense)) < 1e-4


def test_t5_in_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match=r"dtype=float16.*keeps wo.*dtype=.bfloat16"):
        convert(tmp_path, "t5", dtype="float16")


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 without its prefix, with masks": ("gpt2", {}),
    "bert with the other heads": ("bert", {}),
    "clip with its prefix": ("clip_vision_model", {}),
    "pythia with masks": ("gpt_neox", {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_as_they_are_published(tmp_path: Path, name: str) -> None:
    model_type, _ = PUBLISHED[name]
    dense = tiny.dense(model_type).float()
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    if model_type == "gpt2":
        tensors = {n.removeprefix("transformer."): t for n, t in tensors.items()}
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    elif model_type == "bert":
        tensors |= {
            "cls.seq_relationship.weight": torch.ones(2, 32),
            "bert.pooler.dense.weight": torch.ones(32, 32),
            "bert.embeddings.position_ids": torch.arange(64)[None],
        }
    elif model_type == "clip_vision_model":
        tensors = {f"vision_model.{n}": t for n, t in tensors.items()}
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    else:
        for i in range(2):
            mask = torch.ones(1, 1, 64, 64).tril()
            tensors[f"gpt_neox.layers.{i}.attention.bias"] = mask.bool()
            tensors[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, file, {"format": "pt"})
    made = upcycle(
        tmp_path / "dense", tmp_path / "moe", verify="logits", expert_init="permute", progress=False
    )
    assert made.proof.holds
    assert difference(dense, load(made.output, dense), **tiny.inputs(dense)) < 1e-4


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    dense = tiny.dense("vit").float()
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    save_file(load_file(file) | {"adapter.weight": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(UpcyclingError, match=r"adapter\.weight.*no place in SparseViT"):
        upcycle(tmp_path / "dense", tmp_path / "moe", progress=False)
    assert not (tmp_path / "moe").exists()


CLEAN = """
import sys
sys.modules["fusion_upcycle"] = None  # as where it is not installed
import torch
from transformers import AutoModelForImageClassification, AutoModelForCausalLM
for folder, auto in zip(sys.argv[1:], (AutoModelForImageClassification, AutoModelForCausalLM)):
    try:
        auto.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("ran code of the folder")
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    given, output = torch.load(folder + ".expected")
    with torch.no_grad():
        assert (model(**given).logits - output).abs().max() < 1e-4
    model.save_pretrained(folder + "-again")
    print(type(model).__name__, type(model).__module__.split(".")[0])
"""


def test_the_folder_loads_where_we_are_not_installed(tmp_path: Path) -> None:
    converted = [convert(tmp_path / name, name, torch.float32) for name in ("vit", "gpt2")]
    for dense, made, moe in converted:
        assert (made.output / "modeling_sparse.py").is_file()
        given = tiny.inputs(dense)
        torch.save((given, tiny.output(moe, **given)), f"{made.output}.expected")
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, *(str(made.output) for _, made, _ in converted)],
        capture_output=True, text=True, env={"HF_HOME": str(tmp_path / "cache"), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    names = ("SparseViTForImageClassification", "SparseGPT2LMHeadModel")
    assert done.stdout.splitlines() == [f"{name} transformers_modules" for name in names]
    for dense, made, moe in converted:
        again = load(Path(f"{made.output}-again"), dense)  # what it saved is ours as well
        assert difference(moe, again, **tiny.inputs(dense)) == 0


def test_models_are_pickled_and_copied(tmp_path: Path) -> None:
    _, _, moe = convert(tmp_path, "gpt2", torch.float32, routing="hash")
    given = tiny.inputs(moe)
    expected = tiny.output(moe, **given)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(tiny.output(other, **given), expected)
        next(
            block for block in other.modules() if isinstance(block, SparseMLP)
        ).experts.down_proj.data += 1
        assert torch.equal(tiny.output(moe, **given), expected)


def test_only_the_families_that_are_asked_for_are_made() -> None:
    code = (
        "import fusion_upcycle.models, sys;"
        "from transformers import CONFIG_MAPPING as m, AutoConfig;"
        "from fusion_upcycle.models import modeling_sparse as s;"
        "assert not [n for n in vars(s) if n.startswith('SparseViT')];"
        "assert 'sparse_vit' in m and 'sparse_nothing' not in m and 'nothing' not in m;"
        "assert type(AutoConfig.for_model('sparse_vit')).__name__ == 'SparseViTConfig';"
        "assert 'transformers.models.bert.modeling_bert' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_files_are_the_same_again(tmp_path: Path) -> None:
    _, one, _ = convert(tmp_path / "a", "t5", expert_init="noise", routing="hash")
    _, two, _ = convert(tmp_path / "b", "t5", expert_init="noise", routing="hash")
    first, second = tensors_of(one.output), tensors_of(two.output)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = json.loads((one.output / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"].endswith(".SparseT5ForConditionalGeneration")
    assert AutoConfig.from_pretrained(one.output).moe_routing == "hash"
    card = (one.output / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card and "trust_remote_code=True" in card
    assert "of which a table gives 2 to each token id" in card
    assert {*files_of(one.output)} >= {"modeling_sparse.py", "README.md", "upcycling.json"}


def test_saving_a_model_ships_its_code(tmp_path: Path) -> None:
    _, made, moe = convert(tmp_path, "t5", torch.float32)
    moe.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    name = "modeling_sparse.SparseT5ForConditionalGeneration"
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == name
    assert (tmp_path / "again" / "modeling_sparse.py").is_file()
    assert tensors_of(made.output).keys() == tensors_of(tmp_path / "again").keys()


def test_converted_says_what_was_made(tmp_path: Path) -> None:
    _, made, moe = convert(tmp_path, "vit")
    assert isinstance(made, Converted)
    assert made.record["class"] == "SparseViTForImageClassification"
    assert made.record["parameters"]["total"] == moe.num_parameters()


def test_auto_goes_on_to_our_own_class_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a family of transformers cannot express a model; what no class can is still refused."""
    dense = tiny.dense("llama", mlp_bias=True).float()
    dense.save_pretrained(tmp_path / "dense")
    made = upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, progress=False)
    assert made.record["class"] == "SparseLlamaForCausalLM" and made.proof.holds
    assert re.search(r"target=auto is sparse, .*mlp_bias=True cannot be expressed", caplog.text)
    plain = tiny.dense("llama").float()
    plain.save_pretrained(tmp_path / "plain")
    caplog.clear()
    made = upcycle(tmp_path / "plain", tmp_path / "mixtral", num_experts=4, progress=False)
    assert made.record["class"] == "MixtralForCausalLM" and not caplog.text
    config = json.loads((tmp_path / "plain" / "config.json").read_text()) | {"novel_norm": 2}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    for target in ("mixtral", "sparse"):
        caplog.clear()
        out = tmp_path / target / "x"
        assert upcycle(tmp_path / "plain", out, target=target, progress=False).proof.holds
        assert "unknown field novel_norm=2" in caplog.text
    config |= {"moe_routing": "hash"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UpcyclingError, match=r"moe_routing='hash', which LlamaConfig"):
        upcycle(tmp_path / "plain", tmp_path / "y", target="sparse", progress=False)


HEADS = [
    ("gemma2", "Gemma2ForSequenceClassification"),  # asks AutoModel for its base
    ("llama", "LlamaModel"),
    ("vit", "ViTModel"),
    ("t5", "T5EncoderModel"),
    ("t5", "T5ForSequenceClassification"),
    ("bert", "BertForQuestionAnswering"),
    ("bert", "BertForPreTraining"),
    ("dinov2", "Dinov2Backbone"),
    ("clip_vision_model", "CLIPVisionModelWithProjection"),
]


@pytest.mark.parametrize(("model_type", "name"), HEADS)
def test_heads_of_all_kinds(tmp_path: Path, model_type: str, name: str) -> None:
    dense = tiny.dense(model_type, name=name).float()
    dense.save_pretrained(tmp_path / "dense")
    made = upcycle(
        tmp_path / "dense",
        tmp_path / "moe",
        target="sparse",
        num_experts=3,
        expert_init="permute",
        verify="layers",
        progress=False,
    )
    assert made.proof.holds and made.record["class"] == f"Sparse{name}"
    assert verify(made.output, progress=False, mode="logits").holds
    assert type(load(made.output, dense)).__name__ == f"Sparse{name}"


def test_a_head_over_several_texts_is_refused(tmp_path: Path) -> None:
    tiny.dense("bert", name="BertForMultipleChoice").float().save_pretrained(tmp_path / "dense")
    with pytest.raises(UpcyclingError, match=r"BertForMultipleChoice is run on several texts"):
        upcycle(tmp_path / "dense", tmp_path / "moe", progress=False)


#: What published configs have beside the fields of transformers' class.
LEFT_OVER_FIELDS: dict[str, dict[str, Any]] = {
    "bert": {"gradient_checkpointing": False, "position_embedding_type": "absolute"},
    "clip_vision_model": {"dropout": 0.0, "top_k": 50, "no_repeat_ngram_size": 0},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    "gpt2": {"n_ctx": 64, "task_specific_params": {"text-generation": {"max_length": 50}}},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000, "torch_dtype": "float32"},
    "opt": {"activation_dropout": 0.0, "prefix": "</s>"},
    "t5": {"n_positions": 512, "output_past": True},
    "vit": {"encoder_stride": 16},
}


@pytest.mark.parametrize("model_type", LEFT_OVER_FIELDS)
def test_configs_as_they_are_published(tmp_path: Path, model_type: str) -> None:
    dense = tiny.dense(model_type).float()
    dense.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | LEFT_OVER_FIELDS[model_type]))
    again: Any = type(dense)
    expected = again.from_pretrained(tmp_path / "dense").eval()
    made = upcycle(tmp_path / "dense", tmp_path / "moe", verify="logits", progress=False)
    assert difference(expected, load(made.output, expected), **tiny.inputs(dense)) < 1e-4


def test_a_t5_that_does_not_know_how_its_decoder_begins_is_refused(tmp_path: Path) -> None:
    from fusion_upcycle.live.inputs import require_decoder_start

    dense = tiny.dense("t5")
    require_decoder_start(dense)
    del dense.config.decoder_start_token_id
    with pytest.raises(UpcyclingError, match=r"t5 model has no decoder_start_token_id.*0 for a T5"):
        require_decoder_start(dense)
