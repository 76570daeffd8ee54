"""FusionBench's lazy pools give mappings of tensors for models: these are taken in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.utils import LazyStateDict
from helpers import convert
from omegaconf import OmegaConf
from tiny import dense_folder, files_of, load
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusion_upcycle.method import (
    ExpertUpcyclingAlgorithm,
    MoEMergingAlgorithm,
    SparseUpcyclingAlgorithm,
)


def entry(form: str, folder: Path) -> Any:
    if form == "path":
        return str(folder)
    # As in FusionBench's own configs: what is lazy needs the class, not its `from_pretrained`.
    return {
        "_target_": "transformers.AutoModelForCausalLM",
        "pretrained_model_name_or_path": str(folder),
    }


def pool(models: dict[str, Any], **kwargs: Any) -> CausalLMPool:
    return CausalLMPool(
        OmegaConf.create(models),
        tokenizer=None,
        model_kwargs=OmegaConf.create(kwargs),
        enable_lazy_loading=True,
    )


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return dense_folder(tmp_path / "dense")


@pytest.mark.parametrize("form", ["path", "config"])
def test_upcycling_takes_a_lazy_pool(form: str, source: Path) -> None:
    lazy = pool({"_pretrained_": entry(form, source)})
    made = SparseUpcyclingAlgorithm(4, 2).run(lazy)
    expected = SparseUpcyclingAlgorithm(4, 2).run(load(source))
    assert made is not None
    assert expected is not None
    assert same(made, expected)
    assert isinstance(lazy.load_model("_pretrained_"), LazyStateDict)  # and leaves it as it is


def test_its_dtype_counts(source: Path) -> None:
    made = SparseUpcyclingAlgorithm(4, 2).run(
        pool({"_pretrained_": str(source)}, torch_dtype="bfloat16")
    )
    assert made is not None
    assert made.dtype == torch.bfloat16


def test_a_lazy_pool_is_streamed_like_any(source: Path, tmp_path: Path) -> None:
    method = SparseUpcyclingAlgorithm(4, 2, str(tmp_path / "a"), verify="none", return_model=False)
    method.run(pool({"_pretrained_": str(source)}))
    convert(source, tmp_path / "b")
    weights = [files_of(tmp_path / name)["model.safetensors"] for name in "ab"]
    assert weights[0] == weights[1]


def test_merging_takes_a_lazy_pool(source: Path, tmp_path: Path) -> None:
    other = dense_folder(tmp_path / "other", seed=1)
    folders = {"x": source, "y": other}
    made = MoEMergingAlgorithm(2).run(pool({n: entry("config", f) for n, f in folders.items()}))
    expected = MoEMergingAlgorithm(2).run({name: load(f) for name, f in folders.items()})
    assert made is not None
    assert expected is not None
    assert same(made, expected)


def test_expansion_takes_a_lazy_pool(source: Path, tmp_path: Path) -> None:
    moe = convert(source, tmp_path / "moe", expert_init="noise").output
    made = ExpertUpcyclingAlgorithm(8).run(pool({"_pretrained_": str(moe)}))
    expected = ExpertUpcyclingAlgorithm(8).run(load(moe))
    assert made is not None
    assert expected is not None
    assert same(made, expected)


def test_lazy_mappings_themselves_are_models(source: Path, tmp_path: Path) -> None:
    lazy = LazyStateDict(str(source), meta_module_class=AutoModelForCausalLM, cache_state_dict=True)
    lazy["model.norm.weight"] = changed = torch.full_like(lazy["model.norm.weight"], 3)
    made = SparseUpcyclingAlgorithm(4, 2).run(lazy)
    assert made is not None
    assert torch.equal(made.model.norm.weight, changed)
    other = dense_folder(tmp_path / "other", seed=1)
    merged = MoEMergingAlgorithm(2).run(
        {"x": LazyStateDict(str(source)), "y": LazyStateDict(str(other))}
    )
    expected = MoEMergingAlgorithm(2).run({"x": load(source), "y": load(other)})
    assert merged is not None
    assert expected is not None
    assert same(merged, expected)
