"""Adding an expert later: as a merge of all at once would have been, from the new texts alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_adapters
import tiny_sparse
import torch
from fusion_bench.modelpool import CausalLMPool
from helpers import merge
from omegaconf import OmegaConf
from test_families import MATRIX
from test_method import run
from test_plugin import compose
from tiny import (
    assert_same_bits,
    dense_folder,
    edit_config,
    edit_tensors,
    load,
    logits_of,
    tensors_of,
)
from tiny_adapters import lora
from tiny_merges import STATISTICS, TEXTS, add, merged, speakers, statistics_of, text_of, with_merge
from transformers import PreTrainedModel

from fusion_upcycle import ExpertAdditionAlgorithm, MoEMergingAlgorithm
from fusion_upcycle.cli import main
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.merging.merging import BASE
from fusion_upcycle.verify import verify

#: One source and one set of options of each family, from the matrix of the families.
FAMILIES = {(target, family): (family, fields, target) for family, fields, target, _ in MATRIX}
#: Of unlike files: fused, packed, with a shared expert, a selection bias, a width said otherwise.
UNLIKE = ("phi3", "granite", "qwen2", "ernie4_5", "youtu", "lfm2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fine-tunes, and a merge of the first two."""
    return with_merge(tmp_path_factory.mktemp("merged"))


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


def test_a_lora_adapter_may_be_added(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora(made[BASE], tmp_path / "lora", "up_proj", "q_proj")
    done = add(
        made["moe"],
        tmp_path / "lora",
        tmp_path / "out",
        data=text_of(made, "three"),
        base=made[BASE],
        verify="auto",
    )
    expected = tiny_adapters.merged(made[BASE], tmp_path / "lora").state_dict()
    found = tensors_of(tmp_path / "out")["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    assert torch.allclose(found, expected["model.layers.0.mlp.up_proj.weight"], atol=1e-6)
    assert "trains outside of the FFNs (q_proj) is not in the result" in caplog.text
    assert done.record["experts"]["lora"] == [2]
    assert verify(tmp_path / "out", progress=False).details["kept"] == done.proof.details["kept"]


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


def test_a_new_model_may_differ_as_in_a_merge(tmp_path: Path) -> None:
    models = speakers(tmp_path)
    larger = dense_folder(tmp_path / "three", seed=3, vocab_size=300)
    byte_tokenizer(64).save_pretrained(larger)
    edit_config(larger, use_cache=False, eos_token_id=5)
    texts = {name: text_of(models, name) for name in ("one", "two", "three")}
    merged(models, tmp_path / "moe", "one", "two", vocabulary="largest")
    merged(models, tmp_path / "all", "one", "two", "three")
    done = add(tmp_path / "moe", larger, tmp_path / "out", data=texts["three"], verify="auto")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "all"))
    assert {"use_cache", "vocab_size"} <= done.record["differences"]["config"].keys()
    assert verify(tmp_path / "out", progress=False).details["kept"] == done.proof.details["kept"]


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


def test_a_run_of_fusion_bench_adds_an_expert(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(
        tmp_path / "run",
        "method=expert_addition",
        f"method.data={text_of(made, 'three')}",
        f"method.save_checkpoint={tmp_path / 'out'}",
        f"modelpool.models._pretrained_={made['moe']}",
        f"+modelpool.models.three={made['three']}",
        f"modelpool.tokenizer={made['moe']}",
    )
    add(made["moe"], made["three"], tmp_path / "same", data=text_of(made, "three"))
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "same"))
    assert found["merged_model"].config.num_local_experts == 3
    shown = compose("method=expert_addition", "method.data=x.txt", "method.save_checkpoint=out")
    config = dict(ExpertAdditionAlgorithm("x.txt", "out").config)
    assert {name: config[name] for name in shown.method if name != "_target_"} == {
        name: value for name, value in shown.method.items() if name != "_target_"
    }
    with pytest.raises(UpcyclingError, match="names the folders of both models"):
        models = {BASE: load(made["moe"]), "three": load(made["three"])}
        ExpertAdditionAlgorithm("x.txt", str(tmp_path / "live")).run(models)
    with pytest.raises(UpcyclingError, match=r"set data=\"PATH\""):
        ExpertAdditionAlgorithm(None, str(tmp_path / "live"))


def test_a_merge_in_memory_keeps_them_beside_what_it_saves(
    made: dict[str, Path], tmp_path: Path
) -> None:
    texts = {name: text_of(made, name) for name in ("one", "two")}
    options = {"shared": "base", "calibration": texts, "verify": "none", **STATISTICS}
    pool = CausalLMPool(
        OmegaConf.create(
            {name: {"_target_": f"{__name__}.loaded", "folder": str(made[name])} for name in WHOLE}
        ),
        tokenizer=str(made[BASE]),
    )
    MoEMergingAlgorithm(2, str(tmp_path / "moe"), **options).run(pool)
    moments = "moments.safetensors"
    assert statistics_of(tmp_path / "moe")[moments] == statistics_of(made["moe"])[moments]
    assert str(made["one"].parent).encode() not in statistics_of(tmp_path / "moe")["config.json"]
    add(tmp_path / "moe", made["three"], tmp_path / "out", data=text_of(made, "three"))
    with pytest.raises(UpcyclingError, match=r"statistics=True keeps them.*save_checkpoint="):
        MoEMergingAlgorithm(2, **options)


WHOLE = (BASE, "one", "two")


def loaded(folder: str) -> PreTrainedModel:
    """A model that a pool makes by a function, so that it cannot be streamed."""
    return load(Path(folder))
