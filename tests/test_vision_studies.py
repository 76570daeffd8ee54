"""Study, table of step 0 and experiment of images: on made images, and what their records say."""

import importlib
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from fusion_upcycle import upcycle
from fusion_upcycle.benchmark.application import config_tree
from fusion_upcycle.benchmark.experiment import read_experiment, trial_count
from fusion_upcycle.benchmark.preparation import prepare
from fusion_upcycle.live.loading import load_by_config
from fusion_upcycle.report.tables import read_run_record
from fusion_upcycle.tables.images import load_images

STUDIES = Path(__file__).resolve().parents[1] / "examples" / "studies"
MODULES = ("lab", "fashion", "figures", "vision", "vision_work", "step0", "vision_tasks")


def made(number: int) -> tuple[Any, Any]:
    """A bright bar, whose place is the class."""
    labels = (np.arange(number) % 10).astype(np.uint8)
    pixels = np.random.default_rng(number).integers(0, 90, (number, 28, 28)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label : 2 * label + 6] += 120
    return pixels, labels


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        found = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        patch.setitem(found.fashion.RECIPE, "examples", 256)
        patch.setitem(found.vision_tasks.RECIPE, "examples", 128)
        patch.setattr(found.vision_tasks, "SIZES", {"train": 64, "validation": 10, "test": 20})
        yield found
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def home(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With images and the base that is trained on them."""
    folder = tmp_path_factory.mktemp("output") / "fashion"
    splits = {"train": made(256), "validation": made(64), "test": made(64)}
    scripts.fashion.write(splits, folder / "images")
    scripts.fashion.base(folder)
    return folder


def test_idx_files_become_splits(scripts: SimpleNamespace, tmp_path: Path) -> None:
    pixels, labels = made(40)
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.fashion, "HELD_OUT", 10)
        folder = scripts.fashion.images(tmp_path / "home", tmp_path)
    found = {s: load_images(str(folder), "x", splits=[s]) for s in ("train", "validation", "test")}
    assert {split: len(images) for split, images in found.items()} == {
        "train": 30,
        "validation": 10,
        "test": 40,
    }
    image, label = found["validation"].item(0)
    assert label == labels[30] and (np.asarray(image) == pixels[30]).all()
    assert tuple(found["test"].classnames or ()) == scripts.fashion.CLASSES


def test_the_package_is_fetched_by_apt_and_unpacked(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(command: list[str], *, cwd: Path, check: bool) -> None:
        asked.append(command[:2])
        if command[0] == "apt-get":
            (cwd / "dataset-fashion-mnist_1_all.deb").touch()
        else:
            assert (cwd / command[2]).is_file() and check

    monkeypatch.setattr(subprocess, "run", run)
    assert scripts.fashion.unpacked(tmp_path).is_relative_to(tmp_path)
    assert asked == [["apt-get", "-q"], ["dpkg-deb", "-x"]]


@pytest.mark.parametrize("arm", [0, 1, 3], ids=["dense", "expert choice", "token choice"])
def test_a_run_is_trained_and_scored(
    scripts: SimpleNamespace, home: Path, tmp_path: Path, arm: int
) -> None:
    run = scripts.vision.run(list(scripts.vision.ARMS)[arm], 0.5)
    row = asdict(run) | scripts.vision_work.train_run(run, home.parent / "study", tmp_path)
    assert scripts.lab.of_row(row) == run
    assert row["images"] == 128  # half of the base's, in whole steps
    before, after = row["before"], row["scores"]["test"]
    assert after["loss_nats_per_image"] < before["loss_nats_per_image"]
    assert ("layer_2/left_out" in row["routing"]) == (arm == 1)
    assert row["parameters"]["total"] == (205_066 if arm == 0 else 669_322)


def test_flops_are_those_that_torch_counts(scripts: SimpleNamespace, home: Path) -> None:
    dense = load_by_config(home / "base")
    pixels = next(iter(made(1))).astype(np.float32)
    dense.set_attn_implementation("eager")  # the kernels of others are not counted
    counter = FlopCounterMode(display=False)
    with counter:
        dense(pixel_values=torch.tensor(pixels)[:, None])
    _, counted = scripts.vision_work.facts_of(dense)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_step_0_is_exact_where_every_expert_takes_all(scripts: SimpleNamespace, home: Path) -> None:
    rows = scripts.step0.measure(home, [4], [1, None])
    _, few, few_plain, full, full_plain = rows
    assert set(few["unchosen"]) == {"2", "3"}
    assert all(share > 0.1 for share in few["unchosen"].values())
    for row in (full, full_plain):  # weights of all experts sum to one either way
        assert not any(row["unchosen"].values())
        assert row["largest_difference"] < 1e-5
    assert few_plain["kl_nats_per_image"] > few["kl_nats_per_image"] > 1e-6
    table = scripts.step0.table({"step0": {"rows": rows}}).to_markdown()
    assert "E = 4, C = 1" in table and "| 0.00 / 0.00 |" in table


def test_tasks_have_images_of_their_own_and_a_model(scripts: SimpleNamespace, home: Path) -> None:
    tasks = scripts.vision_tasks
    every, _ = made(256)
    for place, name in enumerate(tasks.TASKS):
        images = load_images(str(tasks.task(home, name)), name, splits=["train"])
        assert len(images) == 64
        expected = tasks.TASKS[name](every[64 * place :][:64])
        assert (np.asarray(images.item(5)[0]) == expected[5]).all()
        assert not (expected[5] == every[64 * place + 5]).all()
    tuned = load_by_config(tasks.fine_tune(home, "rotated"))
    base = load_by_config(home / "base")
    assert tuned.config.id2label == base.config.id2label
    assert not (tuned.classifier.weight == base.classifier.weight).all()


def recorded() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_run_record(STUDIES / "results" / "vision")["vision"]["runs"]
    return rows


def test_both_arms_take_the_rate_that_was_the_best_of_equally_many_trials(
    scripts: SimpleNamespace,
) -> None:
    for kind, arm in zip(("dense", "moe"), scripts.vision.ARMS, strict=False):
        tried = {
            row["options"]["learning_rate"]: row["scores"]["validation"]["loss_nats_per_image"]
            for row in scripts.lab.select(recorded(), arm=arm, share=0.2, seed=1)
        }
        assert len(tried) == 4
        assert min(tried, key=lambda rate: tried[rate]) == scripts.vision.RATES[kind]


def test_budgets_are_equal_in_flops(scripts: SimpleNamespace) -> None:
    of_dense = {r["share"]: r["flops"] for r in recorded() if r["arm"] == "dense"}
    for row in recorded():
        if row["share"]:
            assert row["flops"] == pytest.approx(of_dense[row["share"]], rel=0.002), row["arm"]


def shipped() -> dict[str, Any]:
    with initialize_config_dir(str(config_tree()), version_base="1.3"):
        name = "vision_three_tasks"
        cfg = compose("benchmark", [f"benchmark@_global_={name}", f"experiment={name}"])
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def test_the_experiment_is_planned_without_the_images(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    content = shipped()
    models = content["modelpool"]["options"]["models"]
    assert list(models) == ["_pretrained_", *scripts.vision_tasks.TASKS]
    assert Path(models["noisy"]) == scripts.fashion.HOME / "models" / "noisy"
    for folder in models.values():
        Path(folder).mkdir(parents=True)  # there, and not looked into
    experiment = read_experiment(content)
    assert {trial_count(method) for method in experiment.methods.values()} == {0, 12}
    for method in content["methods"].values():  # one trial of each is planned: it takes 0.1 s
        method["trials"] = {name: values[:1] for name, values in method.get("trials", {}).items()}
    plan = prepare(read_experiment(content), tmp_path / "out")
    assert len(plan) == len(models) + len(experiment.methods)
    groups = {planned.run.row: requests[0].facts["group"] for planned, requests in plan}
    assert groups["Upcycled, expert choice, C = 2, step 0"] == "Model Mixing"


def test_dense_and_upcycled_are_trained_with_the_same_flops(
    scripts: SimpleNamespace, tmp_path: Path
) -> None:
    methods = shipped()["methods"]
    dense = ViTForImageClassification(ViTConfig(**scripts.fashion.SHAPE))
    dense.save_pretrained(tmp_path / "dense")
    _, unit = scripts.vision_work.facts_of(dense)
    given = methods["dense_trained"]["options"]
    for name in ("expert_choice_trained", "token_choice_trained"):
        options = methods[name]["options"]
        how = {
            option.partition(".")[2]: value
            for option, value in options.items()
            if option.startswith("upcycling.")
        }
        made = tmp_path / name
        upcycle(tmp_path / "dense", made, verify="none", progress=False, **how)
        _, cost = scripts.vision_work.facts_of(load_by_config(made))
        assert options["training.examples"] == round(given["examples"] * unit / cost)
        for option, value in given.items():
            if option != "examples":
                assert options[f"training.{option}"] == value, option
