"""Training through FusionBench's CLI program, the chain after upcycling, and carried moments."""

import json
from pathlib import Path
from typing import Any

import fusion_bench.scripts.cli as cli
import pytest
import torch
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from safetensors.torch import load_file
from tiny import assert_same_bits, dense_model, load, tensors_of
from tiny_training import DATA, TOKENIZER, moe_model, run
from torch import Tensor

from fusion_upcycle import upcycle
from fusion_upcycle.architectures import ARCHITECTURES, OWN
from fusion_upcycle.checkpoint.moments import MOMENTS_FILE
from fusion_upcycle.checkpoint.staging import RECORD_FILE
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.method import ContinuedPretrainingAlgorithm, UpcycleAndTrainAlgorithm
from fusion_upcycle.training.moments import load_moments
from fusion_upcycle.training.options import TrainingOptions, make_training_options
from fusion_upcycle.training.run import Origin

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

SMALL = ("context_length=16", "batch_size=4", "log_every=1", "accelerator=cpu", "progress=false")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama with the byte tokenizer."""
    dense_model(vocab_size=257).save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def compose(output: Path, *overrides: str) -> DictConfig:
    cfg = initialize_hydra_config(
        "fabric_model_fusion",
        [f"path.log_dir={output}", "print_config=false", "fabric.accelerator=cpu", *overrides],
        return_hydra_config=True,
    )
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(output)
        HydraConfig.instance().set_config(cfg)
        return DictConfig({key: value for key, value in cfg.items() if key != "hydra"})


def cli_run(output: Path, *overrides: str) -> dict[str, Any]:
    """One in-process run of FusionBench's program; what its `run` returns."""
    return cli.main(compose(output, *overrides))


def pool_of(folder: Path) -> list[str]:
    return [
        "modelpool=CausalLMPool/mistral-7b",
        f"modelpool.models._pretrained_={folder}",
        f"modelpool.tokenizer={folder}",
        "modelpool.model_kwargs.torch_dtype=float32",
    ]


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "run_record.json").read_text())


def test_the_demo_base_is_trained_and_evaluated_from_the_command_line(
    demo_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    result = cli_run(
        output,
        "method=continued_pretraining",
        "modelpool=CausalLMPool/demo_base",
        "method.data=demo",
        "method.tokens=4096",
        *(f"method.{option}" for option in SMALL if "context" not in option),
        "method.context_length=128",
        f"method.save_checkpoint={tmp_path / 'out'}",
        "method.mixture={prose: 0.5, source: 0.3, arithmetic: 0.2}",
        "taskpool=CausalLMPerplexityTaskPool/local_files",
        "taskpool.texts={few: {_target_: tiny_training.documents}}",
        "taskpool.context_length=64",
    )
    record = record_of(output)
    assert record["method"]["algorithm"] == "ContinuedPretrainingAlgorithm"
    assert record["method"]["tokens_trained"] == 4096
    assert Path(record["method"]["source"]["name"]).name == demo_base.name
    assert record["taskpool"]["evaluations"][0]["report"]["few"]["bits_per_byte"] > 0
    assert (output / "logs" / "metrics.csv").is_file()
    assert_same_bits(load(tmp_path / "out").state_dict(), result["merged_model"].state_dict())


def test_the_chain_upcycles_trains_evaluates_and_records_each(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = cli_run(
        output,
        "method=upcycle_and_train",
        *pool_of(source),
        "method/expert_init@method.upcycling.expert_init=drop",
        "method.upcycling.num_experts=3",
        f"method.upcycling.save_checkpoint={tmp_path / 'moe'}",
        "method.training.tokens=640",
        "method.training.data={numbers: {_target_: tiny_training.documents}}",
        *(f"method.training.{option}" for option in SMALL),
        f"method.training.save_checkpoint={tmp_path / 'out'}",
        "taskpool=CausalLMPerplexityTaskPool/local_files",
        "taskpool.texts={few: {_target_: tiny_training.documents}}",
    )
    record = record_of(output)
    assert record["method"]["algorithm"] == "SparseUpcyclingAlgorithm"
    assert record["method"]["options"]["expert_init"]["name"] == "drop"
    assert record["training"]["algorithm"] == "ContinuedPretrainingAlgorithm"
    assert record["training"]["source"]["name"] == str(tmp_path / "moe")
    assert record["training"]["parameters"]["active"] == record["method"]["parameters"]["active"]
    assert record["taskpool"]["evaluations"]
    before, after = load(tmp_path / "moe"), load(tmp_path / "out")
    assert before.config.num_local_experts == after.config.num_local_experts == 3
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert_same_bits(after.state_dict(), result["merged_model"].state_dict())


def test_every_option_is_in_the_yaml_with_its_default(tmp_path: Path) -> None:
    cfg = compose(tmp_path, "method=continued_pretraining", "method.data=demo").method
    cfg.tokens = 8192
    method = ContinuedPretrainingAlgorithm(**{k: v for k, v in cfg.items() if k != "_target_"})
    assert method._options == TrainingOptions(tokens=8192)
    for name in TrainingOptions.__dataclass_fields__:
        assert name in cfg


def test_the_demo_text_is_new_to_the_demo_models_and_held_out_for_validation() -> None:
    method = ContinuedPretrainingAlgorithm("demo", tokens=8192, validation="demo")
    assert {text["split"] for text in method._data.values()} == {"continued"}
    assert method._validation is not None
    assert {text["split"] for text in method._validation.values()} == {"validation"}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"learning_rte": 1}, "learning_rte.*Did you mean 'learning_rate'"),
        ({"save_chekpoint": "x"}, "save_chekpoint.*Did you mean 'save_checkpoint'"),
        ({"tokens": 10}, "tokens=10 is less than one step"),
        ({"data": ["notes.txt"]}, r"method\.data=\['notes\.txt'\] must be a mapping"),
        ({"data": None}, r"method\.data is not set"),
    ],
)
def test_options_of_the_method_are_checked_at_once(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UpcyclingError, match=words):
        ContinuedPretrainingAlgorithm(**{"data": DATA, "tokens": 99_999} | option)


def test_without_a_tokenizer_or_a_place_it_is_said_what_to_set() -> None:
    with pytest.raises(UpcyclingError, match=r"method\.tokenizer"):
        ContinuedPretrainingAlgorithm(DATA, tokens=99_999).run(dense_model())


def test_a_model_without_a_pool_is_trained(source: Path, tmp_path: Path) -> None:
    options = dict(option.split("=") for option in SMALL[:2])
    small = {name: int(value) for name, value in options.items()}
    common: dict[str, Any] = {"tokens": 128, "tokenizer": str(source), "progress": False, **small}
    with pytest.raises(UpcyclingError, match="work_folder="):
        ContinuedPretrainingAlgorithm(DATA, **common).run(load(source))
    method = ContinuedPretrainingAlgorithm(DATA, work_folder=str(tmp_path / "work"), **common)
    model = load(source)
    assert method.run(model) is model
    assert (tmp_path / "work" / "logs").is_dir()


def test_a_chain_that_cannot_go_on_is_refused() -> None:
    node = {"_target_": "fusion_upcycle.method.SparseUpcyclingAlgorithm", "num_experts": 2}
    node |= {"experts_per_token": 1, "save_checkpoint": "x", "return_model": False}
    target = "fusion_upcycle.method.ContinuedPretrainingAlgorithm"
    training = {"_target_": target, "data": DATA, "tokens": 99_999}
    with pytest.raises(UpcyclingError, match=r"upcycling\.return_model"):
        UpcycleAndTrainAlgorithm(node, training)
    UpcycleAndTrainAlgorithm(node, training | {"devices": 2, "strategy": "fsdp"})
    with pytest.raises(UpcyclingError, match=r"by several processes.*strategy=fsdp"):
        UpcycleAndTrainAlgorithm(node | {"return_model": True}, training | {"devices": 2})


def test_a_chain_goes_on_with_the_moe_of_its_own_dense_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_upcycle.training.launching.start", lambda *_: None)
    node = {"_target_": "fusion_upcycle.method.SparseUpcyclingAlgorithm", "num_experts": 2}
    node |= {"experts_per_token": 1, "verify": "none"}
    training = {"_target_": "fusion_upcycle.method.ContinuedPretrainingAlgorithm", "data": DATA}
    training |= {"tokens": 99_999, "strategy": "fsdp", "work_folder": str(tmp_path / "work")}

    def made(dense: str, **options: Any) -> tuple[Path, int]:
        models = {"_pretrained_": str(tmp_path / dense)}
        pool = CausalLMPool(models, tokenizer=None, model_kwargs=kwargs)
        folder = UpcycleAndTrainAlgorithm(node | options, training)._made_once(pool)
        return folder, (folder / RECORD_FILE).stat().st_mtime_ns

    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        dense_model(vocab_size=257).save_pretrained(tmp_path / name)
    kwargs: dict[str, Any] = {"dtype": "bfloat16"}
    first = made("one")
    assert made("one") == first
    kwargs = {}
    for name in ("one", "two"):  # of another dtype, and of another model
        with pytest.raises(UpcyclingError, match=r"method\.upcycling\.overwrite=true"):
            made(name)
        folder, again = made(name, overwrite=True)
        assert (folder, again) == made(name, overwrite=True) != first
    found = tensors_of(folder)["model.embed_tokens.weight"]
    assert torch.equal(found, tensors_of(tmp_path / "two")["model.embed_tokens.weight"])


# --- moments ----------------------------------------------------------------------------------


def dense_run(folder: Path, family: str = "llama", **fields: Any) -> tuple[Path, dict[str, Tensor]]:
    """Folder of a trained dense model, and its moments."""
    output = folder / "trained"
    run(dense_model(family, vocab_size=257, **fields), folder, 3, output=output, save_moments=True)
    return output, load_file(output / MOMENTS_FILE)


@pytest.mark.parametrize("family", ARCHITECTURES.without(OWN))
def test_each_expert_gets_the_moments_of_the_ffn_it_was_made_from(
    family: str, tmp_path: Path
) -> None:
    dense_type = next(iter(ARCHITECTURES[family].dense))
    folder, dense = dense_run(tmp_path, dense_type)
    record = upcycle(
        folder, tmp_path / "moe", target=family, num_experts=3, expert_init="drop", progress=False
    ).record
    model = load(tmp_path / "moe")
    moments = load_moments(folder, model, record["options"])
    architecture = ARCHITECTURES[family]
    for kind in ("exp_avg", "exp_avg_sq"):
        for layer in range(2):
            prefix = f"model.layers.{layer}."
            experts = prefix + architecture.experts_module
            ffn = {
                part.partition("_")[0]: dense[f"{prefix}{name}/{kind}"]
                for part, name in architecture.dense[dense_type].ffn.items()
            }
            packed = moments[f"{experts}.gate_up_proj"][kind]
            for expert in range(3):
                assert torch.equal(packed[expert], torch.cat([ffn["gate"], ffn["up"]]))
                assert torch.equal(moments[f"{experts}.down_proj"][kind][expert], ffn["down"])
        for name, values in moments.items():
            if f"{name}/{kind}" in dense:
                assert torch.equal(values[kind], dense[f"{name}/{kind}"])
    fresh = {name for name, _ in model.named_parameters()} - moments.keys()
    assert all(
        name.endswith((architecture.live_router_name, "gate.weight")) or "bias" in name
        for name in fresh
    )
    assert all(float(values["step"]) == 3 for values in moments.values())
    run(model, tmp_path / "on", 1, optimizer_state=folder, origin=Origin("x", record["options"]))


def test_the_folder_says_how_its_model_was_made(tmp_path: Path) -> None:
    """For the moments; where none are carried, a model that an older version made trains on."""
    folder, _ = dense_run(tmp_path, "llama")
    moe = upcycle(folder, tmp_path / "moe", progress=False, verify="none").output
    TOKENIZER.save_pretrained(moe)
    options = ["method=continued_pretraining", *pool_of(moe), "method.tokens=64", "taskpool=dummy"]
    options += ["method.data={numbers: {_target_: tiny_training.documents}}"]
    options += [f"method.{option}" for option in SMALL]
    carried = f"method.optimizer_state={folder}"
    cli_run(tmp_path / "carried", *options, carried)
    assert record_of(tmp_path / "carried")["method"]["tokens_trained"] == 64
    record = json.loads((moe / RECORD_FILE).read_text())
    record["options"]["scaling"] = "megatron"
    (moe / RECORD_FILE).write_text(json.dumps(record))
    cli_run(tmp_path / "fresh", *options)
    with pytest.raises(UpcyclingError, match=r"older version with scaling=megatron"):
        cli_run(tmp_path / "refused", *options, carried)


def test_fine_grained_experts_get_the_moments_of_their_neurons(tmp_path: Path) -> None:
    folder, dense = dense_run(tmp_path)
    options = {"num_experts": 4, "experts_per_token": 2, "granularity": 2, "target": "qwen2_moe"}
    record = upcycle(folder, tmp_path / "moe", progress=False, **options).record
    moments = load_moments(folder, load(tmp_path / "moe"), record["options"])
    down = dense["model.layers.0.mlp.down_proj.weight/exp_avg"]
    packed = moments["model.layers.0.mlp.experts.down_proj"]["exp_avg"]
    assert torch.equal(packed[2], down[:, :24])
    assert torch.equal(packed[3], down[:, 24:])


def test_moments_carry_a_run_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    """Two runs of 3 steps with the state between them are one of 6, but for the data's order."""
    options: dict[str, Any] = {"schedule": "constant", "gradient_clip": 0.0}
    data = {"same": {"_target_": "tiny_training.documents", "count": 1}}
    options |= {"batch_size": 1, "context_length": 9, "data": data}  # all of it in each step
    whole = run(dense_model(vocab_size=257), tmp_path / "whole", 6, **options)
    kept = {"output": tmp_path / "half", "save_moments": True}
    first = run(dense_model(vocab_size=257), tmp_path / "1", 3, **kept, **options)
    second = run(first.model, tmp_path / "2", 3, optimizer_state=tmp_path / "half", **options)
    assert_same_bits(second.model.state_dict(), whole.model.state_dict())


def test_moments_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UpcyclingError, match=r"has no training/optimizer\.safetensors: .* save_moments=True, or"
    ):
        run(load(source), tmp_path / "a", optimizer_state=source)
    folder, _ = dense_run(tmp_path)
    with pytest.raises(UpcyclingError, match=r"not known.*upcycle_and_train"):
        run(moe_model(), tmp_path / "b", optimizer_state=folder)
    wider = dense_model(vocab_size=257, intermediate_size=64)
    with pytest.raises(UpcyclingError, match="of another model"):
        run(wider, tmp_path / "c", optimizer_state=folder)


def test_the_folder_of_a_trained_model_is_a_source_again(tmp_path: Path) -> None:
    folder, _ = dense_run(tmp_path)
    proof = upcycle(folder, tmp_path / "moe", progress=False).proof
    assert proof.holds
    assert not any("optimizer" in name for name in tensors_of(tmp_path / "moe"))


def test_options_are_json() -> None:
    options = make_training_options(tokens=99_999, mixture={"a": 1.0}, freeze=["routers"])
    again = json.loads(json.dumps(options.to_json()))
    assert make_training_options(**again) == options
