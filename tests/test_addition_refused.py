"""What cannot be added, or was damaged, is refused by name and found by the proof."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import as_older, dense_folder, edit_config, edit_tensors, files_of
from tiny_merges import add, merged, text_of, with_merge

from fusion_upcycle.addition.proof import check_kept
from fusion_upcycle.addition.run import read_merged
from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.verify import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fine-tunes, and a merge of the first two."""
    return with_merge(tmp_path_factory.mktemp("merged"))


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
        "statistics=True",
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
    with pytest.raises(UpcyclingError, match=r'router_init="prototype", .*statistics=True'):
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
        ({"router_init": "normal", "calibration": None}, 'router_init="prototype"'),
        ({"experts_per_model": 2}, "experts_per_model=1"),
        ({"expert_init": "noise"}, 'expert_init="copy"'),
        ({"normalize_topk_prob": False, "target": "qwen2_moe"}, "normalize_topk_prob=True"),
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


@pytest.mark.filterwarnings("ignore:.*made by an earlier version")
def test_a_changed_expert_or_router_or_source_is_found(
    made: dict[str, Path], tmp_path: Path
) -> None:
    add(made["moe"], made["three"], tmp_path / "out", data=text_of(made, "three"))
    assert "router_statistics/moments.safetensors" in (tmp_path / "out/SHA256SUMS").read_text()
    as_older(tmp_path / "out")  # or each change is found by the digests of files
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
    assert verify(tmp_path / "out", progress=False).mode == "layers"


def test_the_models_tensors_are_looked_for_apart_from_the_rules(
    made: dict[str, Path], tmp_path: Path
) -> None:
    addition = read_merged(made["moe"]).plan("three", Located(made["three"]))
    folder = tmp_path / "out"
    add(made["moe"], made["three"], folder, data=text_of(made, "three"))
    assert check_kept(addition, CheckpointReader(folder)) > 0
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    with pytest.raises(ProofError, match=r"model\.norm\.weight of the model"):
        check_kept(addition, CheckpointReader(folder))
