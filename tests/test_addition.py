"""Adding an expert later: as a merge of all at once would have been, from the new texts alone."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_sparse
import torch
from helpers import QUICK, merge
from test_families import MATRIX
from tiny import (
    assert_same_bits,
    dense_folder,
    edit_config,
    edit_tensors,
    files_of,
    load,
    logits_of,
    tensors_of,
)

from fusion_upcycle import add_expert
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.cli import main
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.merging.merging import BASE
from fusion_upcycle.verify import verify

TEXTS = {
    "one": "abcab cabca " * 300,
    "two": "0123 4567 89 " * 300,
    "three": "XYZ; ZYX: " * 300,
    "four": "(()) )( " * 400,
}
#: One source and one set of options of each family, from the matrix of the families.
FAMILIES = {(target, family): (family, fields, target) for family, fields, target, _ in MATRIX}
#: Of unlike files: fused, packed, with a shared expert, a selection bias, a width said otherwise.
UNLIKE = ("phi3", "granite", "qwen2", "ernie4_5", "youtu", "lfm2")
STATISTICS: dict[str, Any] = {
    "router_init": "prototype",
    "calibration_tokens": 256,
    "statistics": True,
}
add = partial(add_expert, **QUICK)


def speakers(tmp_path: Path, family: str = "llama", **fields: Any) -> dict[str, Path]:
    """A base and four fine-tunes of one shape, each with a text of its own in the same folder."""
    made = {}
    for seed, name in enumerate([BASE, *TEXTS]):
        made[name] = dense_folder(
            tmp_path / name, family, seed=seed, **{"vocab_size": 257} | fields
        )
        byte_tokenizer(64).save_pretrained(made[name])
        (made[name] / "text.txt").write_text(TEXTS.get(name, ""))
    return made


def text_of(models: dict[str, Path], name: str) -> str:
    return str(models[name] / "text.txt")


def merged(models: dict[str, Path], output: Path, *names: str, **options: Any) -> Converted:
    """Some of them, and the base, with statistics."""
    return merge(
        {BASE: models[BASE]} | {name: models[name] for name in names},
        output,
        **{
            "shared": "base",
            "calibration": {name: text_of(models, name) for name in names},
            **STATISTICS,
            **options,
        },
    )


def statistics_of(folder: Path) -> dict[str, bytes]:
    return files_of(folder / "router_statistics")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fine-tunes, and a merge of the first two."""
    folder = tmp_path_factory.mktemp("merged")
    models = speakers(folder)
    merged(models, folder / "moe", "one", "two")
    return models | {"moe": folder / "moe"}


@pytest.mark.parametrize("name", ["t5", "gpt2", "glm", "bert", "phi3"])
def test_our_own_class_of_any_form_does_too(name: str, tmp_path: Path) -> None:
    for seed, folder in enumerate([BASE, "one", "two", "three"]):
        torch.manual_seed(seed)
        tiny_sparse.dense_folder(tmp_path / folder, name, seed=seed)
    texts = {
        "one": tiny_sparse.PROSE * 200,
        "two": tiny_sparse.OTHER * 200,
        "three": "ab cd. " * 900,
    }
    for folder, text in texts.items():
        (tmp_path / folder / "text.txt").write_text(text)
    models = {folder: tmp_path / folder for folder in (BASE, *texts)}
    merged(models, tmp_path / "moe", "one", "two", target="sparse")
    merged(models, tmp_path / "all", *texts, target="sparse")
    add(tmp_path / "moe", models["three"], tmp_path / "out", data=text_of(models, "three"))
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "all"))
    assert statistics_of(tmp_path / "out") == statistics_of(tmp_path / "all")


@pytest.mark.parametrize(
    ("family", "fields", "target"),
    [
        pytest.param(
            *row, marks=[] if row[0] in UNLIKE else pytest.mark.full, id=f"{row[0]} {row[2]}"
        )
        for row in FAMILIES.values()
    ],
)
def test_every_family_gives_the_merge_of_all_at_once(
    family: str, fields: dict[str, Any], target: str, tmp_path: Path
) -> None:
    models = speakers(tmp_path, family, **fields)
    merged(models, tmp_path / "moe", "one", "two", target=target)
    merged(models, tmp_path / "all", "one", "two", "three", target=target)
    add(tmp_path / "moe", models["three"], tmp_path / "out", data=text_of(models, "three"))
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "all"))
    assert statistics_of(tmp_path / "out") == statistics_of(tmp_path / "all")
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "all" / file).read_bytes()


def test_one_after_another_and_each_is_proven_and_proven_again(
    made: dict[str, Path], tmp_path: Path
) -> None:
    first = add(
        made["moe"],
        made["three"],
        tmp_path / "first",
        data=text_of(made, "three"),
        verify="auto",
    )
    assert "bit for bit" in str(first.proof) and "three's FFN, proven" in str(first.proof)
    kept = [name for name in tensors_of(made["moe"]) if ".gate." not in name]
    assert first.proof.details["kept"] == len(kept)
    assert first.proof.details["experts"].keys() == {"three"}
    record = json.loads((tmp_path / "first" / "upcycling.json").read_text())
    assert list(record["sources"]) == ["model", "three"]
    assert record["experts"] == {"one": [0], "two": [1], "three": [2]}
    assert verify(tmp_path / "first", progress=False).details["kept"] == len(kept)

    add(tmp_path / "first", made["four"], tmp_path / "out", data=text_of(made, "four"), name="4th")
    merged(made, tmp_path / "all", *TEXTS)
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "all"))
    assert statistics_of(tmp_path / "out") == statistics_of(tmp_path / "all")


def test_with_the_mean_the_shared_weights_stay_the_models(tmp_path: Path) -> None:
    models = speakers(tmp_path)
    merged(models, tmp_path / "moe", "one", "two", shared="average", dtype="bfloat16")
    done = add(
        tmp_path / "moe",
        models["three"],
        tmp_path / "out",
        data=text_of(models, "three"),
        verify="auto",
    )
    before, after = tensors_of(tmp_path / "moe"), tensors_of(tmp_path / "out")
    old = {name for name in before if ".gate." not in name}
    assert_same_bits({n: after[n] for n in old}, {n: before[n] for n in old})
    own = tensors_of(models["three"])["model.layers.1.mlp.down_proj.weight"]
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    assert torch.equal(after[name], own.bfloat16())
    assert "stays the mean over the models that were merged first" in done.record["shared_weights"]
    assert done.record["shared_weights"] in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", progress=False).claim == "approximate"


def test_each_text_goes_to_its_own_expert(made: dict[str, Path], tmp_path: Path) -> None:
    add(made["moe"], made["three"], tmp_path / "out", data=text_of(made, "three"))
    moe, seen = load(tmp_path / "out"), []
    moe.model.layers[0].mlp.gate.register_forward_hook(
        lambda gate, args, _: seen.append((args[0] @ gate.weight.T).argmax(-1))
    )
    for expert, name in enumerate(["one", "two", "three"]):
        logits_of(moe, torch.tensor([byte_tokenizer(64)(TEXTS[name][7:71])["input_ids"]]))
        assert seen.pop().eq(expert).float().mean() > 0.9, name


def test_a_file_may_hold_what_it_does_not_need(tmp_path: Path) -> None:
    models = speakers(tmp_path, tie_word_embeddings=True)
    merged(models, tmp_path / "moe", "one", "two")
    merged(models, tmp_path / "all", "one", "two", "three")

    def hold_twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(models["three"], hold_twice)
    add(tmp_path / "moe", models["three"], tmp_path / "out", data=text_of(models, "three"))
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "all"))


@pytest.mark.parametrize("last", [False, True])
def test_the_base_may_be_an_expert(last: bool, tmp_path: Path) -> None:
    models = speakers(tmp_path)
    (models[BASE] / "text.txt").write_text("---- ++++ " * 300)
    for folder, names in (("moe", ["one"]), ("all", ["one", "three"])):
        order = ["one", BASE, *names[1:]] if last else [BASE, *names]
        merge(
            {name: models[name] for name in order},
            tmp_path / folder,
            shared="base",
            base_expert=True,
            calibration={name: text_of(models, name) for name in [BASE, *names]},
            **STATISTICS,
        )
    add(tmp_path / "moe", models["three"], tmp_path / "out", data=text_of(models, "three"))
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "all"))


def test_the_command_says_what_is_shared_and_the_size_before(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", text_of(made, "three"), "--name=third"]
    main(["add-expert", str(made["moe"]), str(made["three"]), str(tmp_path / "out"), *flags])
    shown = capsys.readouterr().out
    size = json.loads((tmp_path / "out" / "upcycling.json").read_text())["statistics"]["bytes"]
    assert f"Router statistics, beside the model's weights: {size / 1e6:,.1f} MB." in shown
    assert size == 2 * 32 * (4 * 32 + 8 * 3)
    assert "All that is shared is the base model's" in shown and "Output:" in shown


# --- what is refused --------------------------------------------------------------------------


def _trained(folder: Path) -> None:
    name = "model.layers.1.block_sparse_moe.gate.weight"
    edit_tensors(folder, lambda tensors: tensors[name].mul_(1.1))


def _damaged(folder: Path) -> None:
    path = folder / "router_statistics" / "moments.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


CHANGED: dict[str, tuple[Any, str]] = {
    "a router that was trained": (_trained, "routers of .* are not what its statistics give"),
    "statistics that are damaged": (_damaged, r"moments\.safetensors is damaged"),
    "statistics that are gone": (
        lambda folder: (folder / "router_statistics" / "moments.safetensors").unlink(),
        "statistics=true",
    ),
    "no record": (
        lambda folder: (folder / "upcycling.json").unlink(),
        "not the folder of a merged",
    ),
    "another top-k": (
        lambda folder: edit_config(folder, num_experts_per_tok=1),
        "num_experts_per_tok=1, not 2",
    ),
    "a tensor that is gone": (
        lambda folder: edit_tensors(folder, lambda t: t.pop("model.norm.weight")),
        r"model\.norm\.weight is missing",
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_model_that_has_changed_is_refused(
    what: str, made: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "moe"
    for name, content in files_of(made["moe"]).items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    change, match = CHANGED[what]
    change(model)
    with pytest.raises(UpcyclingError, match=match):
        add(model, made["three"], tmp_path / "out", data=text_of(made, "three"))
    assert not (tmp_path / "out").exists()


def test_a_merge_without_statistics_is_refused_with_the_remedy(
    made: dict[str, Path], tmp_path: Path
) -> None:
    merged(made, tmp_path / "moe", "one", "two", statistics=False)
    assert not (tmp_path / "moe" / "router_statistics").exists()
    with pytest.raises(UpcyclingError, match=r"router_init=prototype, .*statistics=true"):
        add(tmp_path / "moe", made["three"], tmp_path / "out", data=text_of(made, "three"))


NEW: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a shape": ({"hidden_size": 64}, {}, "hidden_size=64, not 32"),
    "another family": ({"family": "mistral"}, {}, "MistralForCausalLM"),
    "a name that is taken": ({}, {"name": "one"}, "name='one' is not a name of its own"),
    "the model's own name": ({}, {"name": "model"}, "'model' is this model itself"),
}


@pytest.mark.parametrize("what", NEW)
def test_a_new_model_that_does_not_fit_is_refused(
    what: str, made: dict[str, Path], tmp_path: Path
) -> None:
    fields, options, match = NEW[what]
    new = dense_folder(tmp_path / "new", **{"vocab_size": 257} | fields)
    byte_tokenizer(64).save_pretrained(new)
    with pytest.raises(UpcyclingError, match=match):
        add(made["moe"], new, tmp_path / "out", data=text_of(made, "three"), **options)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    new = dense_folder(tmp_path / "new", vocab_size=257)
    byte_tokenizer(64).save_pretrained(new)
    path = new / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(UpcyclingError, match="another tokenizer"):
        add(made["moe"], new, tmp_path / "out", data=text_of(made, "three"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"router_init": "normal", "calibration": None}, "router_init=prototype"),
        ({"experts_per_model": 2}, "experts_per_model=1"),
        ({"expert_init": "noise"}, "expert_init=copy"),
        ({"normalize_topk_prob": False, "target": "qwen2_moe"}, "normalize_topk_prob=true"),
        ({"statistics": "yes"}, "statistics='yes' must be true or false"),
    ],
    ids=str,
)
def test_statistics_that_would_be_of_no_use_are_refused(
    options: dict[str, Any], match: str, made: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=match):
        merged(made, tmp_path / "out", "one", "two", **options)


# --- what a proof finds -----------------------------------------------------------------------


def test_a_changed_expert_or_router_or_source_is_found(
    made: dict[str, Path], tmp_path: Path
) -> None:
    add(made["moe"], made["three"], tmp_path / "out", data=text_of(made, "three"))
    good = files_of(tmp_path / "out")
    for name, match in (
        ("model.layers.0.block_sparse_moe.experts.1.w1.weight", "differs from its origin"),
        ("model.layers.0.block_sparse_moe.experts.2.w1.weight", "differs from its origin"),
        ("model.layers.0.block_sparse_moe.gate.weight", "not what its statistics give"),
    ):
        edit_tensors(tmp_path / "out", lambda tensors, name=name: tensors[name].mul_(1.5))
        with pytest.raises(ProofError, match=match):
            verify(tmp_path / "out", progress=False)
        (tmp_path / "out" / "model.safetensors").write_bytes(good["model.safetensors"])
    with pytest.raises(UpcyclingError, match="is not the folder of a merged model"):
        verify(tmp_path / "out", made["one"], progress=False)
    assert verify(tmp_path / "out", progress=False).mode == "logits"


def test_the_models_tensors_are_looked_for_apart_from_the_rules(
    made: dict[str, Path], tmp_path: Path
) -> None:
    from fusion_upcycle.addition.proof import check_kept
    from fusion_upcycle.addition.run import read_merged

    addition = read_merged(made["moe"]).plan("three", made["three"])
    folder = tmp_path / "out"
    add(made["moe"], made["three"], folder, data=text_of(made, "three"))
    assert check_kept(addition, CheckpointReader(folder)) > 0
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    with pytest.raises(ProofError, match=r"model\.norm\.weight of the model"):
        check_kept(addition, CheckpointReader(folder))
