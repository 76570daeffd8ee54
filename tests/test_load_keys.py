"""A folder is proven by what transformers finds in it, without reading its weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_sparse
import torch
from helpers import convert
from tiny import dense_folder, edit_tensors
from torch import Tensor

from fusion_upcycle.errors import ProofError
from fusion_upcycle.verification.loading import check_load_keys

HEAD = "lm_head.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no head": (lambda t: t.pop(HEAD), f"MixtralForCausalLM does not find {HEAD}"),
    "no expert": (lambda t: t.pop(EXPERT), r"(does not find|another shape).*layers\.1.*experts"),
    "a stray tensor": (lambda t: t.update(stray=torch.ones(2)), "has no place for stray in"),
    "another shape": (
        lambda t: t.update({HEAD: torch.ones(3, 32)}),
        f"expects in another shape {HEAD} in",
    ),
    "an expert of another shape": (
        lambda t: t.update({EXPERT: torch.ones(3, 32)}),
        r"MixtralForCausalLM cannot load .*moe",
    ),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGES.values(), ids=DAMAGES)
def test_what_transformers_would_not_load_is_named(
    damage: Callable[[dict[str, Tensor]], object],
    match: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = convert(dense_folder(tmp_path / "dense"), tmp_path / "moe").output
    check_load_keys(output)
    edit_tensors(output, damage)
    capsys.readouterr()
    with pytest.raises(ProofError, match=match):
        check_load_keys(output)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["layers", "logits"])
def test_a_proof_looks_at_the_load_keys(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would notice: our own reader takes every tensor by the name that we gave it."""
    source = dense_folder(tmp_path / "dense")
    monkeypatch.setattr(
        "fusion_upcycle.conversion.conversion.check_tensors",
        lambda *_, **__: pytest.fail("too late"),
    )

    def lose(*_: Any) -> list[str]:
        edit_tensors(next(tmp_path.glob(".moe*")), lambda t: t.pop(HEAD))
        return []

    monkeypatch.setattr("fusion_upcycle.conversion.run.copy_companions", lose)
    with pytest.raises(ProofError, match=HEAD):
        convert(source, tmp_path / "moe", verify=mode)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_folders_are_proven_without_loading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fusion_upcycle.conversion.run.load_model", lambda *_, **__: pytest.fail("loaded")
    )
    made = convert(dense_folder(tmp_path / "dense"), tmp_path / "moe", verify="auto")
    assert made.proof.mode == "layers"
    assert made.proof.holds


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["mixtral", "sparse"])
def test_tied_heads_are_no_missing_tensors(target: str, tied: bool, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", tie_word_embeddings=tied)
    check_load_keys(convert(source, tmp_path / "moe", target=target).output)


@pytest.mark.parametrize("name", tiny_sparse.SIX)
def test_our_own_class_finds_its_tensors(name: str, tmp_path: Path) -> None:
    tiny_sparse.dense_folder(tmp_path / "dense", name)
    output = convert(tmp_path / "dense", tmp_path / "moe").output
    check_load_keys(output)
    edit_tensors(output, lambda t: t.pop(next(key for key in t if "experts" in key)))
    with pytest.raises(ProofError, match=r"(does not find|another shape) .*experts"):
        check_load_keys(output)
