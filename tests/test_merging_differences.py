"""Fine-tunes that differ: in config.json, in vocabulary rows, in what stands beside the weights."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merge
from test_merging import folders, pool
from tiny import (
    assert_same_bits,
    dense_folder,
    dense_model,
    edit_config,
    edit_tensors,
    load,
    logits_of,
    tensors_of,
    token_ids,
)
from transformers import (
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    GPT2Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from fusion_upcycle import MoEMergingAlgorithm
from fusion_upcycle.cli import main
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.loading import load_by_config
from fusion_upcycle.merging.agreement import _changes_nothing, _fields, agree
from fusion_upcycle.merging.merging import BASE
from fusion_upcycle.merging.options import MergingOptions

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


# --- config.json ------------------------------------------------------------------------------

#: What ordinary fine-tunes have otherwise than their base.
HARMLESS: dict[str, Any] = {
    "use_cache": False,
    "eos_token_id": [5, 6],
    "bos_token_id": 4,
    "pad_token_id": 9,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "pretraining_tp": 2,
    "unsloth_version": "2026.1",
    "unsloth_fixed": True,
    "attention_dropout": 0.1,
    "transformers_version": "4.40.1",
    "_name_or_path": "/home/somebody/out",
    "a_field_of_nobody": {"deep": [1]},
    "temperature": 0.7,
    "quantization": "none",
    "tokenizer_class": "LlamaTokenizer",
    "head_dim": 8,  # said, where the base has it by its default
}


def test_what_a_forward_pass_does_not_need_is_the_bases(tmp_path: Path) -> None:
    models = folders(tmp_path, BASE, "one", "two")
    alike = merge(models, tmp_path / "alike")
    edit_config(models["one"], **HARMLESS)
    edit_config(models["two"], **HARMLESS | {"eos_token_id": 8, "use_cache": True})
    made = merge(models, tmp_path / "moe")
    assert_same_bits(tensors_of(tmp_path / "moe"), tensors_of(tmp_path / "alike"))
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config == json.loads((tmp_path / "alike" / "config.json").read_text())
    assert (config["use_cache"], config["eos_token_id"]) == (True, 5)
    found = made.record["differences"]["config"]
    assert alike.record["differences"] == {"config": {}, "notes": []}
    assert found["eos_token_id"] == {BASE: 5, "one": [5, 6], "two": 8}
    assert found["use_cache"] == {BASE: True, "one": False}
    assert found["max_position_embeddings"] == {BASE: 64, "one": 32, "two": 32}
    assert "transformers_version" not in found


def test_the_first_models_value_counts_where_there_is_no_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = folders(tmp_path, "one", "two")
    edit_config(models["one"], use_cache=False)
    with caplog.at_level(logging.WARNING):
        merge(models, tmp_path / "moe")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["use_cache"] is False
    said = "config.json differs in use_cache: the values are those of one"
    assert f"The models differ: {said}." in caplog.text
    assert f"- {said}" in (tmp_path / "moe" / "README.md").read_text()


COUNTING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rope_theta": (
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        r"rope_parameters\.rope_theta=1000000\.0, not 3456\.0",
    ),
    "rope scaling": (
        {},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 3456.0, "factor": 2.0}},
        r"rope_parameters\.factor=2\.0, not None, rope_parameters\.rope_type='linear'",
    ),
    "norm": ({}, {"rms_norm_eps": 1e-5}, r"rms_norm_eps=1e-05, not 0\.003"),
    "heads": ({}, {"num_key_value_heads": 4}, "num_key_value_heads=4, not 2"),
    "activation": ({}, {"hidden_act": "gelu"}, "hidden_act='gelu', not 'silu'"),
    "bias": ({}, {"attention_bias": True}, "attention_bias=True, not False"),
    "tied": ({}, {"tie_word_embeddings": True}, "tie_word_embeddings=True, not False"),
    "window": ({"family": "mistral"}, {"sliding_window": 13}, "sliding_window=13, not 12"),
    "dynamic rope": (
        {"rope": "dynamic"},
        {"max_position_embeddings": 32},
        "max_position_embeddings=32, not 16",
    ),
    "scaling": ({"family": "granite"}, {"logits_scaling": 3.0}, r"logits_scaling=3\.0, not 2\.5"),
    "layers": ({"family": "olmo3"}, {"layer_types": ["sliding_attention"] * 2}, "layer_types="),
    "quantised": ({}, {"quantization_config": {"quant_method": "gptq"}}, "two is quantised"),
    "code": ({}, {"auto_map": {"AutoConfig": "x.Y"}}, r"two brings code of its own \(auto_map"),
}


@pytest.mark.parametrize("what", COUNTING)
def test_what_a_forward_pass_needs_is_refused_by_name(what: str, tmp_path: Path) -> None:
    fields, change, match = COUNTING[what]
    models = folders(tmp_path, "one", "two", **fields)
    edit_config(models["two"], **change)
    with pytest.raises(UpcyclingError, match=match):
        merge(models, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_positions_do_not_count_where_no_frequency_depends_on_them(
    rope: str, tmp_path: Path
) -> None:
    models = folders(tmp_path, "one", "two", rope=rope)
    edit_config(models["two"], max_position_embeddings=128)
    merge(models, tmp_path / "moe")


@pytest.mark.parametrize(
    ("change", "ignored"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
    ],
    ids=str,
)
def test_an_ignored_field_has_the_bases_value(
    change: dict[str, Any], ignored: str, tmp_path: Path
) -> None:
    models = folders(tmp_path, BASE, "one", "two")
    merge(models, tmp_path / "alike")
    edit_config(models["two"], **change)
    merge(models, tmp_path / "moe", ignore_config_fields=[ignored])
    left, right = (json.loads((tmp_path / m / "config.json").read_text()) for m in ("moe", "alike"))
    assert left == right


def test_windows_that_no_layer_has_do_not_count(tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two", family="qwen2")
    edit_config(models["two"], max_window_layers=1, sliding_window=99)
    merge(models, tmp_path / "moe")


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "phi3", "granite", "gpt2", "opt", "falcon", "gemma2", "bloom"]
)
def test_transformers_agrees_on_what_changes_nothing(family: str) -> None:
    """Fields that are said not to count: their value is changed, and the logits stay."""
    fields = {"head_dim": 8} if family == "gemma2" else {}
    model = dense_model(family, **fields)
    config, expected, tried = model.config, logits_of(model, token_ids()), []
    config.architectures = [type(model).__name__]
    said = _fields(config)
    for field, value in config.to_dict().items():
        if not isinstance(value, bool | int | float) or field == "vocab_size":
            continue
        common = {own: name for name, own in config.attribute_map.items()}.get(field, field)
        if common not in said or not _changes_nothing(common, config, config, (said, said)):
            continue
        changed = type(config).from_dict(
            config.to_dict()
            | {
                field: not value
                if isinstance(value, bool)
                else value * 2 + 0.5
                if isinstance(value, float)
                else value + 3
            }
        )
        tried.append(field)
        other: PreTrainedModel = type(model)(changed).eval()
        other.load_state_dict(model.state_dict())
        assert torch.allclose(logits_of(other, token_ids()), expected, atol=1e-5), field
    assert {"bos_token_id", "use_cache"} <= {*tried}


@pytest.mark.parametrize("kind", [GPT2Config, OPTConfig, BertConfig])
def test_learned_positions_count(kind: type[PreTrainedConfig]) -> None:
    configs = {name: kind() for name in ("one", "two")}
    for config in configs.values():
        config.architectures = [MODEL_MAPPING_NAMES[config.model_type]]
    configs["two"].max_position_embeddings = 32
    with pytest.raises(UpcyclingError, match="max_position_embeddings=32, not"):
        agree(configs, "one")


def test_a_classifier_looks_for_its_special_tokens() -> None:
    models = [dense_model().config for _ in range(2)]
    for config, name in zip(models, ("LlamaForSequenceClassification",) * 2, strict=True):
        config.architectures = [name]
    models[1].pad_token_id = 9
    with pytest.raises(UpcyclingError, match="pad_token_id=9, not 7"):
        agree({"one": models[0], "two": models[1]}, "one")


def test_a_second_name_of_tied_tensors_and_old_buffers_are_of_no_account(tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two", tie_word_embeddings=True)
    merge(models, tmp_path / "alike")
    edit_tensors(
        models["two"],
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    merge(models, tmp_path / "moe")
    assert_same_bits(tensors_of(tmp_path / "moe"), tensors_of(tmp_path / "alike"))


# --- vocabularies -----------------------------------------------------------------------------


def family_of_models(tmp_path: Path, **fields: Any) -> dict[str, Path]:
    """A base of 257 rows, and fine-tunes of 260 and 264, with a token that only they have."""
    models = {}
    for seed, (name, rows) in enumerate({BASE: 257, "one": 260, "two": 264}.items()):
        models[name] = dense_folder(tmp_path / name, vocab_size=rows, seed=seed, **fields)
        tokenizer = byte_tokenizer(64)
        if name == "two":
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        tokenizer.save_pretrained(models[name])
    return models


def rows_by_the_rule(states: list[dict[str, Any]], name: str, rows: int) -> torch.Tensor:
    """Row by row: the mean over the models that have it."""
    tensors = [state[name] for state in states]
    return torch.stack(
        [
            torch.stack([t[row].double() for t in tensors if row < len(t)]).mean(0).float()
            for row in range(rows)
        ]
    )


@pytest.mark.parametrize("vocabulary", ["base", "largest"])
@pytest.mark.parametrize("shared", ["average", "base"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_padded_or_cut_by_the_rule(
    vocabulary: str, shared: str, tied: bool, tmp_path: Path
) -> None:
    models = family_of_models(tmp_path, tie_word_embeddings=tied)
    made = merge(models, tmp_path / "moe", vocabulary=vocabulary, shared=shared, verify="layers")
    rows = {"base": 257, "largest": 264}[vocabulary]
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["vocab_size"] == rows
    files, states = tensors_of(tmp_path / "moe"), {m: tensors_of(p) for m, p in models.items()}
    for name in EMBEDDINGS[: 1 if tied else 2]:
        expected = rows_by_the_rule([states["one"], states["two"]], name, rows)
        if shared == "base":
            expected[:257] = states[BASE][name]
        assert torch.equal(files[name], expected)
    assert made.proof.details["experts"].keys() == {"one", "two"}
    assert all(e["max_abs"] <= 1e-4 * e["scale"] for e in made.proof.details["experts"].values())
    assert load(tmp_path / "moe").config.vocab_size == rows
    note = "vocabularies differ (_pretrained_ 257, one 260, two 264): the rows are those of "
    assert f"{note}{BASE if vocabulary == 'base' else 'two'}" in made.record["differences"]["notes"]
    tokenizer = json.loads((tmp_path / "moe" / "tokenizer.json").read_text())
    added = {token["content"] for token in tokenizer["added_tokens"]}
    assert ("<|im_end|>" in added) == (vocabulary == "largest")
    dropped = [line for line in made.record["differences"]["notes"] if "tokens dropped" in line]
    assert bool(dropped) == (vocabulary == "base")
    assert not dropped or "'<|im_end|>' of two" in dropped[0]


@pytest.mark.parametrize("vocabulary", ["base", "largest"])
@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's head has a bias
def test_rows_are_the_same_bits_in_memory(family: str, vocabulary: str, tmp_path: Path) -> None:
    fields = {"rms_norm_eps": None} if family == "phi" else {}
    models = family_of_models(tmp_path, family=family, dtype=torch.bfloat16, **fields)
    options = {"vocabulary": vocabulary, "verify": "none"}
    live = MoEMergingAlgorithm(2, **options).run(pool(models))
    merge(models, tmp_path / "moe", **options)
    assert live is not None
    assert_same_bits(live.state_dict(), load_by_config(tmp_path / "moe").state_dict())
    assert live.get_output_embeddings().weight.shape[0] == {"base": 257, "largest": 264}[vocabulary]


def test_the_router_is_calibrated_with_the_vocabulary_of_the_result(tmp_path: Path) -> None:
    models = family_of_models(tmp_path)
    texts = {}
    for name in ("one", "two"):
        texts[name] = str(tmp_path / f"{name}.txt")
        Path(texts[name]).write_text(f"{name} text " * 200)
    options = {"calibration": texts, "router_init": "prototype", "calibration_tokens": 256}
    for vocabulary in ("base", "largest"):
        merge(models, tmp_path / vocabulary, vocabulary=vocabulary, **options)


def test_rows_that_no_vocabulary_explains_are_refused(tmp_path: Path) -> None:
    models = folders(tmp_path, "one", "two")
    edit_tensors(models["two"], lambda t: t.update({EMBEDDINGS[0]: t[EMBEDDINGS[0]][:60].clone()}))
    with pytest.raises(UpcyclingError, match=r"embed_tokens.weight of model two has shape \[60"):
        merge(models, tmp_path / "moe")


def test_an_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="Did you mean 'largest'"):
        MergingOptions(vocabulary="larges")


# --- templates, stop tokens, generation -------------------------------------------------------

CHATML = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


def with_tokenizers(models: dict[str, Path]) -> dict[str, Path]:
    for folder in models.values():
        byte_tokenizer(64).save_pretrained(folder)
        (folder / "generation_config.json").unlink()
    return models


def notes_of(output: Path) -> str:
    record = json.loads((output / "upcycling.json").read_text())
    return "\n".join(record["differences"]["notes"])


def settings(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("written", ["chat_template.jinja", "tokenizer_config.json"])
def test_what_the_base_lacks_is_carried_where_all_agree(written: str, tmp_path: Path) -> None:
    models = with_tokenizers(folders(tmp_path, BASE, "one", "two", vocab_size=257))
    for name in ("one", "two"):
        if written == "chat_template.jinja":
            (models[name] / written).write_text(CHATML)
        else:
            settings(models[name], chat_template=CHATML)
        stop = {"eos_token_id": [5, 6], "temperature": 0.5, "transformers_version": name}
        (models[name] / "generation_config.json").write_text(json.dumps(stop))
    made = merge(models, tmp_path / "moe")
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").chat_template == CHATML
    carried = GenerationConfig.from_pretrained(tmp_path / "moe")
    assert (carried.eos_token_id, carried.temperature) == ([5, 6], 0.5)
    assert {"chat_template.jinja", "generation_config.json"} <= {*made.record["copied_files"]}
    notes = notes_of(tmp_path / "moe")
    assert f"chat template of one, two is carried: {BASE} has none" in notes
    assert f"generation_config.json of one, two is carried: {BASE} has none" in notes


def test_a_base_that_has_them_keeps_its_own_and_the_rest_is_said(tmp_path: Path) -> None:
    models = with_tokenizers(folders(tmp_path, BASE, "one", "two", vocab_size=257))
    (models[BASE] / "chat_template.jinja").write_text("base")
    (models["one"] / "chat_template.jinja").write_text(CHATML)
    (models[BASE] / "generation_config.json").write_text('{"eos_token_id": 5, "top_p": 0.9}')
    (models["one"] / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_p": 1}')
    merge(models, tmp_path / "moe")
    assert (tmp_path / "moe" / "chat_template.jinja").read_text() == "base"
    kept = json.loads((tmp_path / "moe" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == 5
    notes = notes_of(tmp_path / "moe")
    assert f"chat template of one dropped: {BASE}'s is kept" in notes
    assert f"stop tokens of one are [5, 6]; {BASE}'s [5] are kept" in notes
    assert f"generation_config.json of one differs in top_p: {BASE}'s is kept" in notes


def test_fine_tunes_that_do_not_agree_are_dropped_by_name(tmp_path: Path) -> None:
    models = with_tokenizers(folders(tmp_path, BASE, "one", "two", vocab_size=257))
    for name in ("one", "two"):
        (models[name] / "chat_template.jinja").write_text(name)
        (models[name] / "generation_config.json").write_text(
            json.dumps({"top_k": 2 + (name == "one")})
        )
    merge(models, tmp_path / "moe")
    assert not (tmp_path / "moe" / "chat_template.jinja").exists()
    assert not (tmp_path / "moe" / "generation_config.json").exists()
    notes = notes_of(tmp_path / "moe")
    assert "chat templates of one, two differ" in notes
    assert "generation_config.json of one, two differ" in notes


def test_stop_tokens_come_with_their_template(tmp_path: Path) -> None:
    """A chat model whose turns end with a token that the base never stops at."""
    models = with_tokenizers(folders(tmp_path, BASE, "one", "two", vocab_size=257))
    (models[BASE] / "generation_config.json").write_text('{"eos_token_id": 5, "top_p": 0.9}')
    for name in ("one", "two"):
        edit_config(models[name], eos_token_id=[5, 6])
        (models[name] / "chat_template.jinja").write_text(CHATML)
    merge(models, tmp_path / "moe")
    kept = json.loads((tmp_path / "moe" / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["top_p"]) == ([5, 6], 0.9)
    assert "stop tokens [6] of one, two are carried, beside [5]" in notes_of(tmp_path / "moe")


def test_a_base_without_stop_tokens_gets_those_that_all_agree_on(tmp_path: Path) -> None:
    models = with_tokenizers(folders(tmp_path, BASE, "one", "two", vocab_size=257))
    path = models[BASE] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    merge(models, tmp_path / "moe", verify="layers")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["eos_token_id"] == 5


def test_a_template_that_writes_dropped_tokens_is_dropped_too(tmp_path: Path) -> None:
    models = family_of_models(tmp_path)
    (models["two"] / "chat_template.jinja").write_text(CHATML + "<|im_end|>")
    merge(models, tmp_path / "base")
    assert not (tmp_path / "base" / "chat_template.jinja").exists()
    assert "it writes '<|im_end|>'" in notes_of(tmp_path / "base")
    merge(models, tmp_path / "largest", vocabulary="largest")
    assert "<|im_end|>" in (tmp_path / "largest" / "chat_template.jinja").read_text()


def test_models_in_memory_say_what_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    models = {name: dense_model(seed=seed) for seed, name in enumerate(("one", "two"))}
    models["two"].generation_config.eos_token_id = [5, 6]
    with caplog.at_level(logging.WARNING):
        MoEMergingAlgorithm(2, verify="none").run(models)
    assert "stop tokens of two are [5, 6]; one's [5] are kept" in caplog.text


def test_fine_tunes_that_differ_in_everything_merge_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = family_of_models(tmp_path)
    edit_config(models["one"], use_cache=False, max_position_embeddings=32, eos_token_id=[5, 6])
    (models["two"] / "chat_template.jinja").write_text(CHATML)
    flags = [f"--model={name}={folder}" for name, folder in models.items() if name != BASE]
    main(["merge", str(tmp_path / "moe"), *flags, f"--base={models[BASE]}", "--quiet"])
    assert "each expert is its model's FFN, proven" in capsys.readouterr().out
