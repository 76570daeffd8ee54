"""Adapters as sources of upcycle and models of a merge: folders, FusionBench, command line."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.modelpool import CausalLMPool
from helpers import convert, grow, merge
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny import assert_same_bits, dense_folder, files_of, load, logits_of, tensors_of
from tiny_adapters import PREFIX, WEIGHTS, edit_adapter, lora, merged, paste
from torch import Tensor

from fusion_upcycle import MoEMergingAlgorithm, SparseUpcyclingAlgorithm
from fusion_upcycle.cli import main
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.merging.merging import BASE
from fusion_upcycle.verify import verify

FFN = ("gate_proj", "up_proj", "down_proj")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float64 and adapters of it, to be read only."""
    folder = tmp_path_factory.mktemp("made")
    base = dense_folder(folder / "base", "llama", dtype=torch.float64)
    lora(base, folder / "math", *FFN, seed=1, use_rslora=True)
    lora(base, folder / "code", "up_proj", "q_proj", seed=2)
    lora(base, folder / "chat", "q_proj", "v_proj", seed=3)
    return folder


def models(made: Path, *names: str) -> dict[str, Path]:
    return {(BASE if name == "base" else name): made / name for name in names}


# --- upcycle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["layers", "logits"])
def test_an_adapter_becomes_an_moe_that_computes_base_and_adapter(
    mode: str, made: Path, tmp_path: Path
) -> None:
    done = convert(made / "code", tmp_path / "moe", num_experts=4, verify=mode)
    assert done.proof.holds
    expected = logits_of(merged(made / "base", made / "code"))
    found = logits_of(load(tmp_path / "moe", experts_implementation="eager"))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (logits_of(load(made / "base")) - expected).abs().max() > 0.1 * expected.abs().max()


def test_the_record_names_adapter_and_base_and_verify_proves_it_again(
    made: Path, tmp_path: Path
) -> None:
    for name in ("base", "code"):
        shutil.copytree(made / name, tmp_path / name)
    convert(tmp_path / "code", tmp_path / "moe", base=tmp_path / "base", verify="layers")
    source = json.loads((tmp_path / "moe" / "upcycling.json").read_text())["source"]
    assert source["files"].keys() == {"adapter_model.safetensors"}
    assert source["base"]["name"] == str(tmp_path / "base")
    assert source["base"]["files"].keys() == {"model.safetensors"}
    assert "`code, a LoRA adapter of base`" in (tmp_path / "moe" / "README.md").read_text()
    assert verify(tmp_path / "moe", progress=False).holds

    for name in ("base", "code"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    moved = {"source": tmp_path / "moved-code", "base": tmp_path / "moved-base"}
    assert verify(tmp_path / "moe", progress=False, **moved).holds
    edit_adapter(tmp_path / "moved-code", lora_alpha=9)
    with pytest.raises(ProofError, match=r"mlp|proj"):
        verify(tmp_path / "moe", progress=False, **moved)


def test_a_base_for_what_is_no_adapter_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match=r"is no adapter.*Leave out base"):
        convert(made / "base", tmp_path / "moe", base=made / "base")


def test_the_output_must_not_hold_the_adapter(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "code", tmp_path / "out" / "code")
    with pytest.raises(UpcyclingError, match="itself, or holds it"):
        convert(folder, tmp_path / "out", overwrite=True)


def test_what_takes_no_adapter_says_how_to_merge_it(made: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(made / "code", tmp_path / "code")
    with pytest.raises(UpcyclingError, match=r"PEFT adapter.*code-merged") as caught:
        grow(adapter, tmp_path / "moe", num_experts=4)
    paste(caught.value)
    expected = merged(made / "base", adapter).state_dict()[UP]
    assert torch.equal(tensors_of(tmp_path / "code-merged")[UP], expected)


# --- merge -------------------------------------------------------------------------------------


def expert(files: dict[str, Tensor], layer: int, index: int) -> dict[str, Tensor]:
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    start = f"model.layers.{layer}.block_sparse_moe.experts.{index}."
    return {part: files[f"{start}{name}.weight"] for part, name in names.items()}


@pytest.mark.parametrize("shared", ["base", "average"])
def test_each_expert_alone_is_the_base_with_its_adapter(
    shared: str, made: Path, tmp_path: Path
) -> None:
    """By the proof, which runs each expert alone, and by hand, against PEFT's merged weights."""
    given = models(made, "base", "math", "code")
    done = merge(given, tmp_path / "moe", shared=shared, verify="layers")
    experts = done.proof.details["experts"]
    assert experts.keys() == {"math", "code"}
    assert all(found["max_abs"] <= 1e-6 * found["scale"] for found in experts.values())
    files, base = tensors_of(tmp_path / "moe"), tensors_of(made / "base")
    dense = {name: merged(made / "base", made / name).state_dict() for name in ("math", "code")}
    for index, name in enumerate(("math", "code")):
        for layer in range(2):
            for part, found in expert(files, layer, index).items():
                expected = dense[name][f"model.layers.{layer}.mlp.{part}.weight"]
                # PEFT multiplies in the adapter's float32.
                assert (found - expected).abs().max() <= 1e-6 * expected.abs().max(), (name, part)
    pair = load_file(made / "math" / WEIGHTS)
    a, b = (pair[f"{PREFIX}{UP.replace('weight', f'lora_{x}.weight')}"].double() for x in "AB")
    expected = base[UP] + 8 / math.sqrt(4) * (b @ a)
    assert torch.equal(expert(files, 1, 0)["up_proj"], expected)  # in float64, to the last bit
    for name in files:
        if "block_sparse_moe" not in name:
            states = [base] if shared == "base" else list(dense.values())
            expected = sum(state[name] for state in states) / len(states)
            assert (files[name] - expected).abs().max() <= 1e-6, name
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(files[changed], base[changed]) == (shared == "base")


def test_adapters_and_whole_models_mix(made: Path, tmp_path: Path) -> None:
    other = dense_folder(tmp_path / "other", "llama", dtype=torch.float64, seed=5)
    given = {"code": made / "code", "other": other}  # the base is the one that `code` names
    assert merge(given, tmp_path / "moe", verify="layers").proof.details["experts"]
    files = tensors_of(tmp_path / "moe")
    assert torch.equal(expert(files, 1, 1)["up_proj"], tensors_of(other)[UP])
    expected = merged(made / "base", made / "code").state_dict()[UP]
    assert (expert(files, 1, 0)["up_proj"] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("live", [False, True])
def test_what_of_an_adapter_is_not_in_the_result_is_said(
    live: bool, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = models(made, "base", "math", "code", "chat")
    with caplog.at_level(logging.WARNING):
        if live:
            method = MoEMergingAlgorithm(2, shared="base", dtype="float64", verify="none")
            method.run(pool(**given)).save_pretrained(tmp_path / "moe")
        else:
            merge(given, tmp_path / "moe", shared="base")
    said = [record.getMessage() for record in caplog.records if "adapter" in record.getMessage()]
    assert [("chat trains nothing" in m, "trains outside" in m) for m in said] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    assert "(q_proj)" in said[0]
    found = expert(tensors_of(tmp_path / "moe"), 1, 2)["up_proj"]
    assert torch.equal(found.float(), tensors_of(made / "base")[UP].float())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("by_config", [False, True])
def test_the_remedy_names_the_base_as_a_merge_is_given_it(
    by_config: bool, streaming: bool, made: Path, tmp_path: Path
) -> None:
    lost = shutil.copytree(made / "code", tmp_path / "lost")
    edit_adapter(lost, base_model_name_or_path=None)
    options: dict[str, Any] = {"save_checkpoint": str(tmp_path / "moe")} if streaming else {}
    if by_config:
        target = "fusion_upcycle.method.MoEMergingAlgorithm"
        method = instantiate({"_target_": target, "experts_per_token": 1, **options})
    else:
        method = MoEMergingAlgorithm(1, **options)
    wanted = "modelpool.models._pretrained_=FOLDER" if by_config else '"_pretrained_": "FOLDER"'
    with pytest.raises(UpcyclingError, match=f"Give it: {wanted}"):
        method.run(pool(lost=lost, math=made / "math"))
    with pytest.raises(UpcyclingError, match='Give it: "_pretrained_": "FOLDER" among'):
        merge({"lost": lost, "math": made / "math"}, tmp_path / "out")


# --- FusionBench -------------------------------------------------------------------------------


def pool(**entries: Any) -> CausalLMPool:
    given = {n: e if isinstance(e, dict) else str(e) for n, e in entries.items()}
    return CausalLMPool(
        OmegaConf.create(given), tokenizer=None, model_kwargs=OmegaConf.create({"dtype": "float32"})
    )


@pytest.mark.parametrize("shared", ["base", "average"])
def test_a_pool_of_adapters_merges_to_the_same_bits_streaming_and_in_memory(
    shared: str, made: Path, tmp_path: Path
) -> None:
    given = pool(**models(made, "base", "math", "code"))
    options: dict[str, Any] = {"experts_per_token": 1, "shared": shared, "verify": "none"}
    live = MoEMergingAlgorithm(**options).run(given)
    assert live is not None
    live.save_pretrained(tmp_path / "live")
    folder = tmp_path / "streamed"
    MoEMergingAlgorithm(save_checkpoint=str(folder), return_model=False, **options).run(given)
    assert_same_bits(tensors_of(tmp_path / "live"), tensors_of(folder))
    convert_bits = expert(tensors_of(folder), 1, 0)["up_proj"]
    assert convert_bits.dtype == torch.float32


@pytest.mark.parametrize("base", [None, "base"])
@pytest.mark.parametrize("auto", [False, True])
def test_a_pools_adapter_is_upcycled(
    auto: bool, base: str | None, made: Path, tmp_path: Path
) -> None:
    entry: Any = made / "code"
    if auto:
        entry = {
            "_target_": "peft.AutoPeftModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(entry),
        }
    options: dict[str, Any] = {"base": None if base is None else str(made / base)}
    live = SparseUpcyclingAlgorithm(2, 1, **options).run(pool(_pretrained_=entry))
    assert live is not None
    live.save_pretrained(tmp_path / "live")
    convert(made / "code", tmp_path / "moe", num_experts=2, experts_per_token=1, dtype="float32")
    assert_same_bits(tensors_of(tmp_path / "live"), tensors_of(tmp_path / "moe"))


def test_a_pools_own_peft_model_is_refused_with_the_way_to_name_it(made: Path) -> None:
    entry = {
        "_target_": "peft.PeftModel.from_pretrained",
        "model": {
            "_target_": "transformers.AutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(made / "base"),
        },
        "model_id": str(made / "code"),
    }
    given = CausalLMPool(OmegaConf.create({"_pretrained_": entry}), tokenizer=None)
    with pytest.raises(UpcyclingError, match=r"not merged.*modelpool\.models\._pretrained_=FOLDER"):
        SparseUpcyclingAlgorithm(2, 1).run(given)


# --- the command line --------------------------------------------------------------------------


def test_the_command_line_takes_adapters(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(shutil.copytree(made / "math", tmp_path / "math"))
    edit_adapter(tmp_path / "math", base_model_name_or_path="somewhere/else")
    base, quiet = ["--base", str(made / "base")], ["--quiet", "--verify", "none"]
    main(["inspect", adapter, *base])
    words = " ".join(capsys.readouterr().out.split())
    assert f"{adapter} is a LoRA adapter of rank 4 (alpha 8) on {made / 'base'}: 1,920" in words
    assert "2 x mlp.up_proj.weight" in words

    main(["upcycle", adapter, str(tmp_path / "moe"), "--num-experts", "2", *base, *quiet])
    main(["verify", str(tmp_path / "moe"), "--quiet"])
    assert "exact, proven" in capsys.readouterr().out
    pairs = ["--model", f"math={adapter}", "--model", f"code={made / 'code'}"]
    main(["merge", str(tmp_path / "merge"), *pairs, *base, *quiet])
    merge(models(made, "base", "math", "code"), tmp_path / "python")
    weights = "model.safetensors"
    assert files_of(tmp_path / "merge")[weights] == files_of(tmp_path / "python")[weights]
    with pytest.raises(SystemExit, match="2"):
        main(["upcycle", adapter, str(tmp_path / "out"), *quiet])
    assert "--base" in capsys.readouterr().err
