"""Objectives through FusionBench's program and through the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from test_taskpool import run as fusion_bench
from tiny import assert_same_bits
from tiny_objectives import WINDOW, case

from fusion_upcycle.cli import main
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.loading import load_by_config
from fusion_upcycle.method import ContinuedPretrainingAlgorithm

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

NUMBER = r"\d+\.\d{4}"
SMALL = {"batch_size": 4, "log_every": 1, "accelerator": "cpu", "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


def saved(family: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of a dense model, and its data."""
    given = case(family, folder)
    given.dense.save_pretrained(folder / "dense")
    given.processor.save_pretrained(folder / "dense")
    return folder / "dense", given.data


def pool(kind: str, model: Path | str, beside: str, folder: Path) -> list[str]:
    return [
        f"modelpool={kind}/folders",
        f"++modelpool.models._pretrained_={model}",
        f"modelpool.{beside}={folder}",
    ]


def words(where: str, **options: Any) -> list[str]:
    return [f"{where}.{name}={value}" for name, value in (SMALL | options).items()]


POOLS = {
    "vit": ("ImageClassificationModelPool", "processor"),
    "clip_vision_model": ("CLIPVisionModelPool", "processor"),
    "t5": ("Seq2SeqLMPool", "tokenizer"),
    "bert": ("Seq2SeqLMPool", "tokenizer"),
    "gpt_neox": ("CausalLMPool", "tokenizer"),
}


@pytest.mark.parametrize("family", POOLS)
def test_models_of_every_pool_are_upcycled_and_trained_in_one_run(
    family: str, tmp_path: Path
) -> None:
    folder, data = saved(family, tmp_path)
    ((name, source),) = data.items()
    source = source if isinstance(source, str) else "{_target_: tiny_training.documents}"
    kind, beside = POOLS[family]
    target = "transformers.AutoModelForMaskedLM.from_pretrained"
    model = str(folder)
    if family == "bert":
        model = f"{{_target_: {target}, pretrained_model_name_or_path: {folder}}}"
    options: dict[str, Any] = {"data": f"{{{name}: {source}}}", "progress": "false"}
    options |= {"save_checkpoint": tmp_path / "out"}
    text = family in ("bert", "gpt_neox")
    options |= {"tokens": 8 * WINDOW, "context_length": WINDOW} if text else {"examples": 8}
    if family == "clip_vision_model":
        options["clip_model"] = tmp_path / "clip"
    result = fusion_bench(
        tmp_path / "run",
        "method=upcycle_and_train",
        *pool(kind, model, beside, folder),
        "method/expert_init@method.upcycling.expert_init=noise",
        "method.upcycling.num_experts=3",
        "method.upcycling.target=sparse",
        *words("method.training", **options),
        "taskpool=dummy",
    )
    record = json.loads((tmp_path / "run" / "run_record.json").read_text())
    assert record["training"]["steps"] == 2
    made = load_by_config(tmp_path / "out")
    assert type(made).__name__.startswith("Sparse")
    assert_same_bits(made.state_dict(), result["merged_model"].state_dict())


def test_a_trained_classifier_is_judged_by_its_task_pool(tmp_path: Path) -> None:
    """What training scores held out is what the task pool says of the same images."""
    folder, data = saved("vit", tmp_path)
    ((_, source),) = data.items()
    fusion_bench(
        tmp_path / "run",
        "method=continued_pretraining",
        *pool(*POOLS["vit"][:1], folder, "processor", folder),
        f"method.validation={{held: {source}}}",
        *words("method", data=f"{{kinds: {source}}}", examples=24, progress="false"),
        "taskpool=ImageClassificationTaskPool/local_files",
        f"taskpool.test_datasets={{held: {source}}}",
    )
    record = json.loads((tmp_path / "run" / "run_record.json").read_text())
    (held,) = record["method"]["validation"]["6"].values()
    report = record["taskpool"]["evaluations"][0]["report"]["held"]
    assert held["accuracy"] == pytest.approx(report["accuracy"])
    assert held["loss_nats_per_image"] == pytest.approx(report["loss"], rel=1e-5)
    assert record["method"]["source"]["name"] == str(folder)


def test_a_tower_is_judged_by_its_task_pool_with_the_texts_that_it_was_trained_by(
    tmp_path: Path,
) -> None:
    """Named as a data set of FusionBench, whose templates, more than one, both take."""
    folder, data = saved("clip_vision_model", tmp_path)
    (source,) = data.values()
    named = f"{{cifar10: {{path: {source}, classnames: [a, b, c]}}}}"
    fusion_bench(
        tmp_path / "run",
        "method=continued_pretraining",
        *pool("CLIPVisionModelPool", folder, "processor", folder),
        f"method.validation={named}",
        *words("method", data=named, examples=8, progress="false"),
        f"method.clip_model={tmp_path / 'clip'}",
        "taskpool=CLIPVisionModelTaskPool/local_files",
        f"taskpool.base_model={tmp_path / 'clip'}",
        f"taskpool.test_datasets={named}",
    )
    record = json.loads((tmp_path / "run" / "run_record.json").read_text())
    (held,) = record["method"]["validation"]["2"].values()
    report = record["taskpool"]["evaluations"][0]["report"]["cifar10"]
    assert held["loss_nats_per_image"] == pytest.approx(report["loss"], rel=1e-5)


def test_without_tokenizer_and_processor_it_is_said_what_to_set(tmp_path: Path) -> None:
    given = case("vit", tmp_path)
    method = ContinuedPretrainingAlgorithm(given.data, examples=8)
    with pytest.raises(UpcyclingError, match=r"method\.tokenizer or method\.processor"):
        method.run(given.dense)


# --- the command line -------------------------------------------------------------------------


def test_a_folder_is_upcycled_and_trained_on_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = saved("t5", tmp_path)
    ((name, source),) = data.items()
    main(["upcycle", str(folder), str(tmp_path / "moe"), "--num-experts", "3", "--quiet"])
    small = ["--batch-size", "4", "--accelerator", "cpu", "--context-length", "32", "--quiet"]
    trained = [str(tmp_path / "moe"), str(tmp_path / "out"), "--data", f"{name}={source}"]
    held_out = ["--validation", f"held={source}", "--freeze", "norms", "--betas", "0.8,0.9"]
    main(["train", *trained, *held_out, *small, "--examples", "8", "--mixture", f"{name}=1"])
    said = capsys.readouterr().out
    assert "held: loss_nats_per_token" in said and "examples per CPU second" in said
    closing = (
        rf"^Trained on 8 examples in 2 steps: seq2seq loss {NUMBER} -> {NUMBER} nats per token; "
    )
    assert re.fullmatch(rf"{closing}saved to {tmp_path / 'out'}\.", said.splitlines()[-1])
    assert not (tmp_path / "out" / "training").exists()
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["options"]["betas"] == [0.8, 0.9]
    assert record["options"]["freeze"] == ["norms"]
    assert record["options"]["mixture"] == {name: 1.0}
    assert record["source"]["upcycling"]["num_experts"] == 3
    assert (tmp_path / "out.training" / "logs" / "metrics.csv").is_file()
    main(["train", *trained, *small, "--examples", "8", "--save-moments", "--overwrite"])
    again = [str(tmp_path / "out"), str(tmp_path / "on"), "--data", f"{name}={source}"]
    main(["train", *again, *small, "--examples", "4", "--optimizer-state", str(tmp_path / "out")])
    assert type(load_by_config(tmp_path / "on")).__name__ == "SparseT5ForConditionalGeneration"


def test_a_whole_clip_model_is_trained_as_its_tower(tmp_path: Path) -> None:
    _, data = saved("clip_vision_model", tmp_path)
    ((name, source),) = data.items()
    clip = str(tmp_path / "clip")
    small = ["--batch-size", "4", "--accelerator", "cpu", "--examples", "4", "--quiet"]
    out = str(tmp_path / "out")
    main(["train", clip, out, "--clip-model", clip, "--data", f"{name}={source}", *small])
    assert type(load_by_config(tmp_path / "out")).__name__ == "CLIPVisionModel"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--examples", "8", "--betas", "0.9,x"], "'x' is not a number"),
        (["--examples", "8", "--data", "other"], "--data 'other' is not NAME=PATH"),
        (["--examples", "8", "--clip-model", "x"], "clip_model=x is for vision towers"),
        (["--tokens", "99999"], "budget of image_classification is in examples"),
        ([], "one of the two must be given"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_said_by_name(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = saved("vit", tmp_path)
    ((name, source),) = data.items()
    given = ["--data", f"{name}={source}", "--accelerator", "cpu", "--quiet", *more]
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(folder), str(tmp_path / "out"), *given])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
