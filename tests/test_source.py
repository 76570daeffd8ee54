"""Where a dense model comes from: Hub ids (from a local Hub cache, offline), companion files."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from tiny import as_older, dense_folder, edit_config, files_of

from fusion_upcycle import upcycle
from fusion_upcycle.checkpoint.source import copy_companions, locate
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.verify import verify

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A Hub cache that holds someone/tiny-llama as huggingface_hub lays it out: links to blobs."""
    repository = tmp_path / "hub" / "models--someone--tiny-llama"
    snapshot = repository / "snapshots" / REVISION
    source = dense_folder(tmp_path / "source")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        blob = repository / "blobs" / file.name
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return tmp_path / "hub"


@pytest.mark.early
def test_a_hub_id_is_upcycled_from_the_hub_cache(hub_cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "moe"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "fusion_upcycle",
            "upcycle",
            "someone/tiny-llama",
            output,
            "--quiet",
        ],
        env=os.environ | {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "exact, proven" in run.stdout
    card = (output / "README.md").read_text()
    assert "base_model: someone/tiny-llama" in card
    assert not (output / "config.json").is_symlink()


def test_a_hub_id_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fusion_upcycle", "inspect", "someone/no-such-model"],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 2
    assert "error: someone/no-such-model is not a folder here" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("source", ["/no/such/folder", "a/b/c", "../x y"])
def test_a_path_that_does_not_exist_is_named(source: str) -> None:
    with pytest.raises(UpcyclingError, match="does not exist"):
        locate(source)


def test_a_file_is_not_a_source(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(UpcyclingError, match="is a file"):
        locate(file)


CARRIED = """added_tokens.json additional_chat_templates/rag.jinja bpe.codes chat_template.jinja
chat_template.json chat_templates/tools.jinja dict.txt emoji.json entity_vocab.json
generation_config.json LICENSE.txt merges.txt NOTICE preprocessor_config.json processor_config.json
prophetnet.tokenizer qwen.tiktoken sentencepiece.bpe.model source.spm special_tokens_map.json
spiece.model spm.model target.spm tekken.json tokenizer.json tokenizer.model tokenizer.model.v3
tokenizer_config.json USE_POLICY.md video_preprocessor_config.json vocab.bpe vocab.json vocab.txt"""
LEFT = """.token adapter_config.json config.json consolidated.safetensors hf_token.txt
model-00001-of-00002.safetensors modeling_evil.py optimizer.pt processor_evil.py README.md
rng_state.pth tokenizer.bin tokenization_evil.py tokenizer.py training_args.bin vocab.pkl x.bin"""


def test_all_of_tokenizer_and_processor_is_carried_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    output.mkdir()
    for name in f"{CARRIED} {LEFT}".split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    assert sorted(copy_companions(source, output)) == sorted(CARRIED.split())
    assert {*files_of(output)} == {*CARRIED.split()}

    asked: dict[str, Any] = {}  # of the Hub: all of this, and no code
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, **given: asked.update(given) or str(source)
    )
    assert locate("someone/model") == source
    names = [*CARRIED.split(), *LEFT.split(), "onnx/model.onnx"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    fetched = {*filter_repo_objects(names, **patterns)}
    assert {*CARRIED.split(), "config.json"} <= fetched
    assert not [name for name in fetched if name.endswith((".py", ".bin", ".pt", ".onnx"))]


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
        {"experts_implementation": "someone/kernel"},
        {"_experts_implementation": "someone/kernel"},
        {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "default",
                "attn_implementation": "x",
            }
        },
        {"num_labels": 10**9},
    ],
    ids=str,
)
def test_a_config_decides_neither_which_code_runs_nor_how_long_a_list_is(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense")
    edit_config(source, **fields)
    assert upcycle(source, tmp_path / "moe", verify="logits", progress=False).proof.holds
    edit_config(as_older(tmp_path / "moe"), **fields)  # a stranger's output is read as carefully
    assert verify(tmp_path / "moe", source, mode="logits", progress=False).holds


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not of a model"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0 is not of a model"),
        ({"head_dim": 0}, "head_dim=0 is not of a model"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a number"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta=inf is not a number"),
        ({"eos_token_id": [5, float("nan")]}, "eos_token_id=nan is not a number"),
        ({"model_type": "nothing_known"}, "knows no model_type 'nothing_known'"),
    ],
)
def test_numbers_that_no_model_has_are_refused_before_anything_is_built(
    fields: dict[str, Any], match: str, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense")
    edit_config(source, **fields)
    before = files_of(tmp_path)
    with pytest.raises(UpcyclingError, match=match):
        upcycle(source, tmp_path / "moe", progress=False)
    assert files_of(tmp_path) == before


def test_an_olmo_2_whose_config_says_0_for_0_0_is_taken(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "olmo2")
    edit_config(source, attention_dropout=0)  # as the published ones do
    assert upcycle(source, tmp_path / "moe", progress=False).proof.holds


@pytest.mark.parametrize("name", ["LICENSE", "additional_chat_templates/a.jinja"])
def test_a_link_that_leads_out_of_the_folder_is_not_copied(name: str, tmp_path: Path) -> None:
    source, secret = dense_folder(tmp_path / "dense"), tmp_path / "secret"
    secret.write_text("mine")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(UpcyclingError, match=rf"{name} is a link to {secret}"):
        upcycle(source, tmp_path / "moe", progress=False)
    assert not (tmp_path / "moe").exists()
    (source / name).unlink()
    (source / "real").write_text("a licence")
    (source / "LICENSE").symlink_to(source / "real")  # within the folder
    upcycle(source, tmp_path / "moe", verify="none", progress=False)
    assert (tmp_path / "moe" / "LICENSE").read_text() == "a licence"
    assert not (tmp_path / "moe" / "LICENSE").is_symlink()


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(UpcyclingError, match=r"PEFT adapter beside the model.*Merge it"):
        upcycle(source, tmp_path / "moe", progress=False)
