"""The FusionBench classes: models, pools, streaming; and a whole run of FusionBench's program."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import fusion_bench.scripts.cli as cli
import pytest
import torch
from fusion_bench import BaseModelPool
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.utils import instantiate
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from test_plugin import compose
from tiny import (
    assert_same_bits,
    dense_folder,
    dense_model,
    files_of,
    load,
    logits_of,
    tensors_of,
    token_ids,
)
from transformers import GPT2Config, GPT2LMHeadModel, MixtralForCausalLM, MixtralModel

from fusion_upcycle import (
    MixtralForCausalLMUpscalingAlgorithm,
    MixtralUpscalingAlgorithm,
    upcycle,
)
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.options import config_tree


def algorithm(output: Path | None = None, **options: Any) -> MixtralForCausalLMUpscalingAlgorithm:
    folder = None if output is None else str(output)
    return MixtralForCausalLMUpscalingAlgorithm(4, 2, folder, **options)


def pool(source: Any, tokenizer: Path | None = None, **model_kwargs: Any) -> CausalLMPool:
    models = {"_pretrained_": source if isinstance(source, dict) else str(source)}
    return CausalLMPool(
        OmegaConf.create(models),
        tokenizer=None if tokenizer is None else str(tokenizer),
        model_kwargs=OmegaConf.create(model_kwargs),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mistral in float32."""
    return dense_folder(tmp_path / "dense", "mistral")


@pytest.fixture(autouse=True)
def no_hydra_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test files leave HydraConfig set; its job would get our run records."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


# --- what can be upcycled ---------------------------------------------------------------------


def test_a_model_becomes_a_live_mixtral_of_the_same_function() -> None:
    dense = dense_model("mistral")
    made = algorithm().run(dense)
    assert type(made) is MixtralForCausalLM
    difference = (logits_of(made) - logits_of(dense)).abs().max()
    assert difference < 1e-4 * logits_of(dense).abs().max()


def test_a_tied_model_is_upcycled_in_memory() -> None:
    made = algorithm().run(dense_model(tie_word_embeddings=True))
    assert made is not None
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_a_plain_pool_is_upcycled_in_memory() -> None:
    dense = dense_model()
    made = algorithm().run(BaseModelPool({"_pretrained_": dense}))
    assert made is not None
    assert_same_bits(made.state_dict(), algorithm().run(dense).state_dict())  # type: ignore[union-attr]


def test_a_live_model_is_saved_as_the_streamed_folder_would_be(
    source: Path, tmp_path: Path
) -> None:
    algorithm(tmp_path / "live", expert_init="noise").run(load(source))
    upcycle(source, tmp_path / "streamed", expert_init="noise", progress=False)
    assert_same_bits(tensors_of(tmp_path / "live"), tensors_of(tmp_path / "streamed"))


def test_a_causal_lm_pool_is_streamed_to_the_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLMPool, "load_model", lambda *_: pytest.fail("loaded the source"))
    made = algorithm(tmp_path / "out").run(pool(source))
    assert type(made) is MixtralForCausalLM
    expected = logits_of(load(source))
    assert (logits_of(made) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_streamed_model_is_returned_as_it_is_on_disk(source: Path, tmp_path: Path) -> None:
    made = algorithm(tmp_path / "out", expert_init="drop").run(pool(source))
    assert made is not None
    assert_same_bits(made.state_dict(), load(tmp_path / "out").state_dict())


def test_return_model_false_writes_and_returns_nothing(source: Path, tmp_path: Path) -> None:
    assert algorithm(tmp_path / "out", return_model=False).run(pool(source)) is None
    assert (tmp_path / "out" / "upcycling.json").is_file()


def test_return_model_false_without_a_folder_is_refused() -> None:
    with pytest.raises(UpcyclingError, match='save_checkpoint="FOLDER"'):
        algorithm(return_model=False)


def test_a_backbone_becomes_a_backbone() -> None:
    dense = dense_model("mistral", backbone=True)
    made = MixtralUpscalingAlgorithm(4, 2).run(dense)
    assert type(made) is MixtralModel
    with torch.no_grad():
        states = [model(token_ids()).last_hidden_state for model in (dense, made)]
    assert (states[0] - states[1]).abs().max() < 1e-4 * states[0].abs().max()


@pytest.mark.parametrize("backbone", [False, True])
def test_a_model_for_the_other_class_is_refused_with_its_name(backbone: bool) -> None:
    cls = MixtralForCausalLMUpscalingAlgorithm if backbone else MixtralUpscalingAlgorithm
    other = "MixtralUpscalingAlgorithm" if backbone else "MixtralForCausalLMUpscalingAlgorithm"
    with pytest.raises(UpcyclingError, match=f"into {other}"):
        cls(4, 2).run(dense_model(backbone=backbone))


def test_a_causal_lm_folder_is_refused_by_the_backbone_class(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="not a MistralForCausalLM"):
        MixtralUpscalingAlgorithm(4, 2, str(tmp_path / "out")).run(pool(source))


def test_another_family_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="LlamaForCausalLM or MistralForCausalLM"):
        algorithm().run(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)))


def test_the_device_mode_and_generation_config_of_the_source_are_kept() -> None:
    dense = dense_model().train()
    dense.generation_config.temperature = 0.7
    made = algorithm().run(dense)
    assert made is not None
    assert made.training
    assert made.device == dense.device
    assert made.generation_config.temperature == 0.7
    assert dense.training


def test_a_model_of_mixed_dtypes_is_not_rounded_silently() -> None:
    dense = dense_model()
    dense.model.embed_tokens.bfloat16()
    with pytest.raises(UpcyclingError, match=r"mixes dtypes.*dtype="):
        algorithm().run(dense)


def test_the_source_model_is_not_changed() -> None:
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    algorithm(expert_init="noise").run(dense)
    assert_same_bits(dense.state_dict(), before)


# --- the pool's say ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("streaming", [True, False])
def test_the_dtype_of_the_pool_is_that_of_the_result(
    streaming: bool, key: str, source: Path, tmp_path: Path
) -> None:
    made = algorithm(tmp_path / "out" if streaming else None).run(pool(source, **{key: "bfloat16"}))
    assert made is not None
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}


def test_the_dtype_of_the_method_wins_over_the_pool(source: Path, tmp_path: Path) -> None:
    method = algorithm(tmp_path / "out", dtype="float16")
    assert method.run(pool(source, torch_dtype="bfloat16")).dtype == torch.float16  # type: ignore[union-attr]


def test_streaming_and_memory_give_the_same_bits_in_the_pools_dtype(
    source: Path, tmp_path: Path
) -> None:
    options = {"expert_init": "permute", "seed": 5}
    bf16 = pool(source, torch_dtype="bfloat16")
    streamed, live = (algorithm(folder, **options).run(bf16) for folder in (tmp_path / "out", None))
    assert streamed is not None
    assert live is not None
    assert_same_bits(streamed.state_dict(), live.state_dict())


def test_a_pool_entry_with_a_target_is_streamed_too(source: Path, tmp_path: Path) -> None:
    entry = {
        "_target_": "transformers.AutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": str(source),
        "dtype": "bfloat16",
    }
    algorithm(tmp_path / "out", return_model=False).run(pool(entry))
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("option", "value"), [("device_map", "auto"), ("load_in_4bit", True), ("revision", "main")]
)
def test_a_loading_option_that_streaming_cannot_honour_is_refused_by_name(
    option: str, value: object, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=f"{option}=.*save_checkpoint=None"):
        algorithm(tmp_path / "out").run(pool(source, **{option: value}))
    assert not (tmp_path / "out").exists()


def test_a_pool_without_a_pretrained_model_is_refused(source: Path) -> None:
    models = BaseModelPool({"one": dense_model(), "two": dense_model()})
    with pytest.raises(UpcyclingError, match=r"_pretrained_.*\['one', 'two'\]"):
        algorithm().run(models)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_tokenizer_comes_along(streaming: bool, source: Path, tmp_path: Path) -> None:
    # The byte tokenizer's ids go up to 256; the proof refuses ids that the model has not.
    source = dense_folder(tmp_path / "wide", vocab_size=257)
    byte_tokenizer(64).save_pretrained(source)
    models: BaseModelPool = pool(source, tokenizer=source)
    if not streaming:
        models.load_model = lambda *_: load(source)  # type: ignore[method-assign]
        models._models = {"_pretrained_": {"_target_": "some.other.loader"}}
    algorithm(tmp_path / "out").run(models)
    names = files_of(tmp_path / "out").keys()
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


def test_a_tokenizer_of_another_folder_is_refused_when_streaming(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=r"modelpool\.tokenizer"):
        algorithm(tmp_path / "out").run(pool(source, tokenizer=tmp_path / "other"))
    assert not (tmp_path / "out").exists()


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("num_expert", "num_experts"), ("save_chekpoint", "save_checkpoint"), ("sede", "seed")],
)
def test_an_unknown_option_is_answered_with_the_nearest(option: str, nearest: str) -> None:
    with pytest.raises(UpcyclingError, match=f"{option}.*Did you mean '{nearest}'"):
        MixtralForCausalLMUpscalingAlgorithm(4, 2, **{option: 1})


@pytest.mark.parametrize("verify", ["yes", True, False])
def test_an_unknown_verify_mode_is_refused_at_once(verify: Any) -> None:
    with pytest.raises(UpcyclingError, match="layers, logits, none"):
        algorithm(verify=verify)


def test_an_earlier_output_is_kept_without_overwrite(source: Path, tmp_path: Path) -> None:
    algorithm(tmp_path / "out", return_model=False).run(pool(source))
    before = files_of(tmp_path / "out")
    with pytest.raises(UpcyclingError, match="overwrite=True"):
        algorithm(tmp_path / "out", seed=1).run(pool(source))
    assert files_of(tmp_path / "out") == before


def test_overwrite_replaces_an_earlier_output(source: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        algorithm(tmp_path / "out", seed=seed, overwrite=True, return_model=False).run(pool(source))
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    assert record["options"]["seed"] == 1


# --- a whole run ------------------------------------------------------------------------------


def run(output: Path, *overrides: str) -> dict[str, Any]:
    """One in-process run of FusionBench's program; what its `run` returns."""
    cfg = initialize_hydra_config(
        "fabric_model_fusion",
        [
            "method=mixtral_moe_upscaling",
            "modelpool=CausalLMPool/mistral-7b",
            "taskpool=dummy",
            f"path.log_dir={output}",
            "print_config=false",
            "fabric.accelerator=cpu",
            "modelpool.model_kwargs.torch_dtype=float32",
            *overrides,
        ],
        return_hydra_config=True,
    )
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(output)
        HydraConfig.instance().set_config(cfg)
        cfg = DictConfig({key: value for key, value in cfg.items() if key != "hydra"})
    return cli.main(cfg)


def method_record(output: Path) -> dict[str, Any]:
    return json.loads((output / "run_record.json").read_text())["method"]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_folder")
def test_a_streaming_run_leaves_folder_and_record(source: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path / "run",
        f"modelpool.models._pretrained_={source}",
        "modelpool.tokenizer=null",
        f"method.save_checkpoint={tmp_path / 'out'}",
        "method.num_experts=3",
        "method.seed=6",
        "method/expert_init=noise",
        "method.expert_init.noise_std=0.25",
    )
    assert type(result["merged_model"]) is MixtralForCausalLM
    record = method_record(tmp_path / "run")
    assert record["algorithm"] == "MixtralForCausalLMUpscalingAlgorithm"
    assert record["options"]["num_experts"] == 3
    assert record["options"]["seed"] == 6
    assert record["options"]["expert_init"] == {"name": "noise", "noise_std": 0.25}
    assert record["proof"]["claim"] == "approximate"
    assert record["costs"]["write"]["wall_seconds"] > 0
    assert record["output"] == str(tmp_path / "out")


@pytest.mark.usefixtures("own_folder")
def test_a_run_in_memory_leaves_a_record(source: Path, tmp_path: Path) -> None:
    run(
        tmp_path / "run",
        f"modelpool.models._pretrained_={source}",
        "modelpool.tokenizer=null",
        "method/router_init=zeros",
    )
    record = method_record(tmp_path / "run")
    assert record["options"]["router_init"] == {"name": "zeros"}
    assert record["proof"]["holds"] is True
    assert record["parameters"]["total"] > record["parameters"]["active"]


@pytest.mark.usefixtures("own_folder")
def test_a_run_and_the_function_give_the_same_bits(source: Path, tmp_path: Path) -> None:
    run(
        tmp_path / "run",
        f"modelpool.models._pretrained_={source}",
        "modelpool.tokenizer=null",
        f"method.save_checkpoint={tmp_path / 'out'}",
        "method/expert_init=drop",
        "method.return_model=false",
    )
    upcycle(source, tmp_path / "function", expert_init="drop", progress=False)
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "function"))


@pytest.mark.usefixtures("own_folder")
def test_a_mistyped_method_option_on_the_command_line_is_named(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="Did you mean 'experts_per_token'"):
        run(
            tmp_path / "run",
            f"modelpool.models._pretrained_={source}",
            "modelpool.tokenizer=null",
            "+method.expert_per_token=2",
        )


@pytest.mark.parametrize("name", ["sparse_upcycling", "mixtral_moe_upscaling"])
def test_the_example_at_the_top_of_the_config_works_as_written(
    name: str, source: Path, tmp_path: Path
) -> None:
    text = (config_tree() / "method" / f"{name}.yaml").read_text()
    command = re.search(r"#   (fusion_bench (?:.*\\\n# +)*.*)", text)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n#", ""))[1:]
    out = tmp_path / "out"
    words = [w.replace("PATH_OR_HUB_NAME", str(source)).replace("=OUT", f"={out}") for w in words]
    cfg = compose(*words)
    made = instantiate(cfg.method, _recursive_=False)
    made.run(instantiate(cfg.modelpool, _recursive_=False))
    assert tensors_of(out)
