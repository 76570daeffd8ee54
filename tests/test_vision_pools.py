"""Model pools and task pools of vision models: the numbers, the data, what is refused."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from fusion_bench.method import (
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.tasks.clip_classification import get_classnames, get_templates
from fusion_bench.utils import instantiate
from helpers import convert
from hydra.core.hydra_config import HydraConfig
from safetensors.torch import load_file, save_file
from test_plugin import compose
from test_taskpool import run
from tiny_vision import (
    KINDS,
    NAMES,
    clip,
    clip_processor,
    image_folder,
    images,
    save,
    t5,
    vit,
    vit_processor,
)
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    CLIPProcessor,
    CLIPVisionModel,
    ViTForImageClassification,
)

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.modelpool import CLIPVisionModelPool, ImageClassificationModelPool
from fusion_upcycle.taskpool import (
    CLIPVisionModelTaskPool,
    ImageClassificationTaskPool,
    SeveralTaskPools,
)

EIGHT = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {name: clip(seed) for seed, name in enumerate(NAMES)}
    return save(models, clip_processor(), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {name: vit(seed) for seed, name in enumerate(NAMES)}
    return save(models, vit_processor(), tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data"))


def clip_pool(clips: dict[str, Path], tasks: Any, **options: Any) -> CLIPVisionModelTaskPool:
    return CLIPVisionModelTaskPool(tasks, base_model=str(clips["_pretrained_"]), **options)


def vit_pool(tasks: Any, **options: Any) -> ImageClassificationTaskPool:
    return ImageClassificationTaskPool(tasks, processor=vit_processor(), **options)


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    right = (logits.argmax(-1) == labels).double()
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    root = math.sqrt(len(labels))
    return {
        "accuracy": right.mean().item(),
        "accuracy_stderr": right.std().item() / root,
        "loss": losses.mean().item(),
        "loss_stderr": losses.std().item() / root,
        "examples": len(labels),
    }


def in_order() -> tuple[list[Any], torch.Tensor]:
    """The images of `image_folder` as `datasets` reads them: class by class."""
    every = images()
    order = [i for kind in range(3) for i in range(12) if i % 3 == kind]
    return [every[i] for i in order], torch.tensor([i % 3 for i in order])


# --- CLIP ---------------------------------------------------------------------------------------


def test_zero_shot_scores_are_those_of_transformers_own_clip(
    clips: dict[str, Path], data: Path
) -> None:
    whole, tower = clip(0), clip(1).vision_model
    pool = clip_pool(clips, {"pets": str(data)}, dataloader_kwargs={"batch_size": 5})
    report = pool.evaluate(tower.train())
    whole.vision_model = tower.eval()
    pictures, labels = in_order()
    texts = [f"a photo of a {kind}" for kind in KINDS]
    inputs = clip_processor()(text=texts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = whole(**inputs).logits_per_image
    assert 0 < report["pets"]["accuracy"] < 1
    assert report["pets"] == pytest.approx(by_hand(logits, labels), rel=1e-5)
    assert report["average"] == {k: v for k, v in report["pets"].items() if k != "examples"}
    assert report["model_info"]["all_params"] == sum(p.numel() for p in tower.parameters())
    json.dumps(report, allow_nan=False)


def test_a_model_keeps_its_mode_and_the_next_one_is_scored_alike(
    clips: dict[str, Path], data: Path
) -> None:
    pool = clip_pool(clips, {"pets": str(data)})
    tower = clip(1).vision_model.train()
    first = pool.evaluate(tower)
    assert all(module.training for module in tower.modules())
    half = pool.evaluate(clip(2).vision_model.to(torch.bfloat16))
    assert math.isfinite(half["pets"]["loss"])
    assert pool.evaluate(tower) == first


def test_templates_and_class_names_of_the_config_are_averaged_as_fusion_bench_does(
    clips: dict[str, Path], data: Path
) -> None:
    task = {
        "path": str(data),
        "classnames": ["lion", "wolf", "hawk"],
        "templates": ["a {}", "the big {}."],
    }
    tower = clip(1).vision_model
    report = clip_pool(clips, {"pets": task}).evaluate(tower)
    theirs = HFCLIPClassifier(clip(0), clip_processor())
    theirs.clip_model.vision_model = tower
    theirs.set_classification_task(
        ["lion", "wolf", "hawk"], [lambda c: f"a {c}", lambda c: f"the big {c}."]
    )
    pictures, labels = in_order()
    with torch.no_grad():
        logits = theirs(clip_processor()(images=pictures, return_tensors="pt")["pixel_values"])
    assert report["pets"] == pytest.approx(by_hand(logits, labels), rel=1e-5)
    assert report != clip_pool(clips, {"pets": str(data)}).evaluate(tower)


@pytest.fixture
def made_data(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Instead of a download; what was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, path: str = "", **options: Any) -> datasets.Dataset:
        asked.append((path or args[0], options["split"]))
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        return datasets.Dataset.from_dict(
            {"image": images(3), "label": [0, 1, 9]}, features=features
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


OURS = "taskpool._target_=fusion_upcycle.taskpool"


def test_the_eight_tasks_of_fusion_bench_run_with_our_class(
    clips: dict[str, Path], made_data: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    set_task = HFCLIPClassifier.set_classification_task

    def few(self: Any, classnames: list[str], templates: list[Any]) -> None:
        counted.append(len(classnames))
        set_task(self, classnames[:10], templates[:2])  # all 758 classes would take 10 s

    monkeypatch.setattr(HFCLIPClassifier, "set_classification_task", few)
    cfg = compose(
        "taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8",
        f"{OURS}.CLIPVisionModelTaskPool",
        f"taskpool.base_model={clips['a']}",
        "taskpool.dataloader_kwargs.num_workers=0",
        "taskpool.dataloader_kwargs.pin_memory=false",
    )
    report = instantiate(cfg.taskpool).evaluate(clip(1).vision_model)
    assert list(report) == [*EIGHT, "average", "model_info"]
    assert all(report[task]["examples"] == 3 for task in EIGHT)
    assert [path for path, _ in made_data] == [
        *("tanganke/sun397", "tanganke/stanford_cars", "tanganke/resisc45", "tanganke/eurosat"),
        *("svhn", "tanganke/gtsrb", "mnist", "tanganke/dtd"),
    ]
    assert {split for _, split in made_data} == {"test"}
    assert counted == [397, 196, 45, 10, 10, 43, 10, 47]


def test_pools_of_fusion_bench_compose_with_our_classes(clips: dict[str, Path]) -> None:
    cfg = compose(
        "modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8",
        "modelpool._target_=fusion_upcycle.modelpool.CLIPVisionModelPool",
        f"modelpool.models._pretrained_={clips['a']}",
        f"modelpool.processor={clips['a']}",
    )
    pool = instantiate(cfg.modelpool)
    assert isinstance(pool, CLIPVisionModelPool) and pool.model_names == list(EIGHT)
    assert pool.test_dataset_names == list(EIGHT)
    assert isinstance(pool.load_processor(), CLIPProcessor)
    assert isinstance(pool.load_pretrained_model(), CLIPVisionModel)
    assert pool.load_clip_model("_pretrained_").config.model_type == "clip"


def test_a_tower_and_a_whole_clip_give_the_same_model(
    clips: dict[str, Path], tmp_path: Path
) -> None:
    clip(1).vision_model.save_pretrained(tmp_path / "tower")
    target = "transformers.CLIPVisionModel.from_pretrained"
    pool = CLIPVisionModelPool(
        {
            "tower": str(tmp_path / "tower"),
            "whole": str(clips["a"]),
            "config": {"_target_": target, "pretrained_model_name_or_path": str(clips["a"])},
        }
    )
    for model in pool.models():
        assert type(model) is CLIPVisionModel
        for name, tensor in clip(1).vision_model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
    pool.save_model(model, str(tmp_path / "again"))
    again = CLIPVisionModelPool({"x": str(tmp_path / "again")}).load_model("x")
    assert torch.equal(again.post_layernorm.bias, model.post_layernorm.bias)
    held = CLIPVisionModelPool({"x": model})
    assert held.load_model("x") is model


@pytest.mark.parametrize("as_config", [False, True])
def test_a_tower_with_other_ffns_is_refused_and_not_drawn(
    as_config: bool, clips: dict[str, Path], tmp_path: Path
) -> None:
    # As the dense class reads the folder of an MoE.
    clip(1).vision_model.save_pretrained(tmp_path / "moe")
    file = tmp_path / "moe" / "model.safetensors"
    renamed = {n.replace(".mlp.fc1", ".mlp.experts.0.fc1"): t for n, t in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    entry: Any = str(tmp_path / "moe")
    if as_config:
        target = "transformers.CLIPVisionModel.from_pretrained"
        entry = {"_target_": target, "pretrained_model_name_or_path": entry}
    with pytest.raises(UpcyclingError, match=r"models\.a: .*lacks .*layers\.0\.mlp\.fc1\.bias"):
        CLIPVisionModelPool({"a": entry}).load_model("a")


def test_a_clip_that_lacks_a_tensor_judges_nothing(clips: dict[str, Path], tmp_path: Path) -> None:
    clip(0).save_pretrained(tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    pool = CLIPVisionModelTaskPool(
        {"p": str(image_folder(tmp_path / "d"))},
        clip_model=str(tmp_path / "clip"),
        processor=str(clips["a"]),
    )
    with pytest.raises(UpcyclingError, match=r"lacks text_projection\.weight of CLIPModel"):
        pool.evaluate(clip(1).vision_model)


# --- image classification -------------------------------------------------------------------------


def vit_logits(model: ViTForImageClassification) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, labels = in_order()
    with torch.no_grad():
        pixels = vit_processor()(images=pictures, return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels).logits, labels


def test_scores_of_a_classifier_are_those_of_a_hand_computation(data: Path) -> None:
    model = vit(1)
    report = vit_pool({"pets": str(data)}, dataloader_kwargs={"batch_size": 7}).evaluate(model)
    logits, labels = vit_logits(model)
    assert report["pets"] == pytest.approx(by_hand(logits, labels), rel=1e-5)


def test_classes_are_the_same_by_name(data: Path) -> None:
    names = {0: "Owl", 1: "hen", 2: "CAT", 3: "dog"}
    model = vit(1, num_labels=4, id2label=names, label2id={n: i for i, n in names.items()})
    logits, labels = vit_logits(model)
    expected = by_hand(logits, torch.tensor([2, 3, 0])[labels])
    assert vit_pool({"pets": str(data)}).evaluate(model)["pets"] == pytest.approx(
        expected, rel=1e-5
    )
    # Names of the config, in the order of the data's labels.
    named = {"path": str(data), "classnames": ["hen", "cat", "owl"]}
    expected = by_hand(logits, torch.tensor([1, 2, 0])[labels])
    assert vit_pool({"pets": named}).evaluate(model)["pets"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog", "hen"], "the model has no class 'owl' among cat, dog, hen"),
        (["cat", "dog", "owl", "o w l"], "the model has several classes 'owl'"),
    ],
)
def test_classes_that_the_model_does_not_have_are_refused(
    names: list[str], message: str, data: Path
) -> None:
    known = dict(enumerate(names))
    labels = {"id2label": known, "label2id": {n: i for i, n in known.items()}}
    model = vit(1, num_labels=len(names), **labels)
    with pytest.raises(UpcyclingError, match=message):
        vit_pool({"pets": str(data)}).evaluate(model)


def test_a_model_of_grey_images_gets_grey_images(data: Path) -> None:
    model = vit(1, num_channels=1)
    pool = ImageClassificationTaskPool({"pets": str(data)}, processor=vit_processor(1))
    pictures, labels = in_order()
    grey = [picture.convert("L") for picture in pictures]
    with torch.no_grad():
        pixels = vit_processor(1)(images=grey, return_tensors="pt")["pixel_values"]
        logits = model(pixel_values=pixels).logits
    assert pixels.shape[1] == 1
    assert pool.evaluate(model)["pets"] == pytest.approx(by_hand(logits, labels), rel=1e-5)


def test_the_processor_is_the_model_pools_or_there_is_none(
    vits: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    models = {"_pretrained_": str(vits["a"])}
    pool = ImageClassificationTaskPool({"pets": str(data)})
    with pytest.raises(UpcyclingError, match=r"set taskpool\.processor"):
        pool.evaluate(vit(1))
    modelpool = ImageClassificationModelPool(models, processor=str(vits["a"]))
    pool._program = SimpleNamespace(
        modelpool=modelpool, fabric=SimpleNamespace(device=torch.device("cpu"))
    )
    assert pool.evaluate(vit(1)) == vit_pool({"pets": str(data)}).evaluate(vit(1))
    modelpool.save_model(vit(2), str(tmp_path / "saved"))
    again = ImageClassificationModelPool({"x": str(tmp_path / "saved")}, processor=None)
    assert torch.equal(again.load_model("x").classifier.weight, vit(2).classifier.weight)
    assert (tmp_path / "saved" / "preprocessor_config.json").is_file()
    with pytest.raises(UpcyclingError, match=r"modelpool\.processor is not set"):
        again.load_processor()


# --- data -----------------------------------------------------------------------------------------


def table(**changes: Any) -> datasets.Dataset:
    pictures, labels = in_order()
    features: dict[str, Any] = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(KINDS)),
    }
    columns = {"image": pictures, "label": labels.tolist(), **changes}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def pandas_bytes(file: Path) -> None:
    """As pandas writes images, without a word about their kind."""
    plain = table().cast_column("image", datasets.Image(decode=False)).with_format(None)
    plain.to_pandas().drop(columns=[]).to_parquet(file)


def write_folder(root: Path) -> Any:
    return str(image_folder(root / "folder"))


def write_parquet(root: Path) -> Any:
    table().to_parquet(root / "x.parquet")
    return str(root / "x.parquet")


def write_parquet_folder(root: Path) -> Any:
    (root / "p").mkdir()
    table().to_parquet(root / "p" / "test.parquet")
    table().select([0]).to_parquet(root / "p" / "train.parquet")
    return {"path": str(root / "p")}


def write_renamed(root: Path) -> Any:
    table().rename_columns({"image": "img", "label": "kind"}).to_parquet(root / "x.parquet")
    return {"path": str(root / "x.parquet")}


def write_pandas(root: Path) -> Any:
    pandas_bytes(root / "x.parquet")
    return {"path": str(root / "x.parquet"), "classnames": list(KINDS)}


def in_memory(root: Path) -> Any:
    return table()


def pairs_in_memory(root: Path) -> Any:
    pictures, labels = in_order()
    return list(zip(pictures, labels.tolist(), strict=True))


def of_a_function(root: Path) -> Any:
    write_parquet_folder(root)
    return {"_target_": "datasets.load_dataset", "path": str(root / "p"), "split": "test"}


FORMS: list[Callable[[Path], Any]] = [
    write_folder,
    write_parquet,
    write_parquet_folder,
    write_renamed,
    write_pandas,
    in_memory,
    pairs_in_memory,
    of_a_function,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_same_images_in_any_form_give_the_same_numbers(
    form: Callable[[Path], Any], tmp_path: Path
) -> None:
    model = vit(1)
    logits, labels = vit_logits(model)
    report = vit_pool({"pets": form(tmp_path)}).evaluate(model)
    assert report["pets"] == pytest.approx(by_hand(logits, labels), rel=1e-5)


def jumbled(names: list[str]) -> dict[str, Any]:
    return {"_target_": f"{__name__}.digits", "names": names}


def digits(names: list[str]) -> datasets.Dataset:
    """Ten classes of this order."""
    labels = {"label": datasets.ClassLabel(names=list(names)), "image": datasets.Image()}
    columns = {"image": images(2), "label": [0, 1]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(labels))


def test_names_of_fusion_bench_must_be_in_the_order_of_the_data(clips: dict[str, Path]) -> None:
    known = get_classnames("cifar10")
    tower = clip(1).vision_model
    same = [name.upper() for name in known]
    assert clip_pool(clips, {"cifar10": jumbled(same)}).evaluate(tower)["cifar10"]["examples"] == 2
    turned = [*known[1:], known[0]]
    with pytest.raises(UpcyclingError, match=r"Set taskpool\.test_datasets\.cifar10\.classnames"):
        clip_pool(clips, {"cifar10": jumbled(turned)}).evaluate(tower)
    said = {**jumbled(turned), "classnames": turned}
    assert clip_pool(clips, {"cifar10": said}).evaluate(tower)["cifar10"]["examples"] == 2


def test_names_of_local_data_come_before_those_of_fusion_bench(
    clips: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    set_task = HFCLIPClassifier.set_classification_task

    def watch(self: Any, names: list[str], templates: list[Any]) -> None:
        seen.append((names, templates[0]("X")))
        set_task(self, names, templates)

    monkeypatch.setattr(HFCLIPClassifier, "set_classification_task", watch)
    clip_pool(clips, {"mnist": str(data)}).evaluate(clip(1).vision_model)
    assert seen == [(list(KINDS), get_templates("mnist")[0]("X"))]


def unlabelled(root: Path) -> Any:
    write_parquet(root)
    datasets.Dataset.from_parquet(str(root / "x.parquet")).remove_columns("label").to_parquet(
        root / "y.parquet"
    )
    return str(root / "y.parquet")


def words(root: Path) -> Any:
    data = datasets.Dataset.from_parquet(write_parquet(root)).remove_columns("label")
    data.add_column("label", ["cat"] * 12).to_parquet(root / "y.parquet")
    return str(root / "y.parquet")


def no_pictures(root: Path) -> Any:
    datasets.Dataset.from_dict({"image": [1], "label": [0]}).to_parquet(root / "y.parquet")
    return str(root / "y.parquet")


def empty(root: Path) -> Any:
    table().select([]).to_parquet(root / "y.parquet")
    return str(root / "y.parquet")


def two_splits(root: Path) -> Any:
    for split in ("train", "validation"):
        (root / "s").mkdir(exist_ok=True)
        table().to_parquet(root / "s" / f"{split}.parquet")
    return str(root / "s")


def kept_back(root: Path) -> Any:
    pictures, _ = in_order()
    return list(zip(pictures, [0, 1] + [-1] * 10, strict=True))


def other_file(root: Path) -> Any:
    (root / "x.zip").touch()
    return str(root / "x.zip")


REFUSED: list[tuple[Any, str]] = [
    (unlabelled, "has no column 'label' but image"),
    (words, "the column 'label' holds string"),
    (no_pictures, "column image"),
    (empty, "y.parquet' cannot be read: .*no data"),
    (two_splits, "has the splits train, validation: choose one"),
    (kept_back, "image 2 has the label -1, and there are 3 classes"),
    (other_file, "the format of '.*x.zip' is not known"),
    ("./nothing", "there is no file or folder"),
    ("nothing.parquet", "there is no file"),
    (3, "=3 must be a file, a folder, or a mapping"),
    ({"split": "test"}, "must be a file, a folder, or a mapping"),
    ({"path": "x", "klassnames": []}, "Did you mean 'classnames'"),
    ({"_target_": "datasets.no_such"}, "pets: 'datasets.no_such' cannot be read"),
]


@pytest.mark.parametrize(
    ("given", "message"),
    REFUSED,
    ids=lambda value: getattr(value, "__name__", str(value)),  # the same in every process
)
def test_images_that_cannot_be_used_are_refused(given: Any, message: str, tmp_path: Path) -> None:
    task = given(tmp_path) if callable(given) else given
    with pytest.raises(
        UpcyclingError, match=rf"taskpool\.test_datasets\.pets.*{message}|{message}"
    ):
        vit_pool({"pets": task}).evaluate(vit(1))


def test_zero_shot_needs_class_names_templates_with_a_place_and_a_tower_that_fits(
    clips: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    tower = clip(1).vision_model
    with pytest.raises(UpcyclingError, match=r"test_datasets\.pets: neither the data nor Fusion"):
        clip_pool(clips, {"pets": pairs_in_memory(tmp_path)}).evaluate(tower)
    task = {"path": str(data), "templates": ["a photo"]}
    with pytest.raises(UpcyclingError, match=r"'a photo' must be a text with \{\}"):
        clip_pool(clips, {"pets": task}).evaluate(tower)
    other = CLIPVisionModel(type(tower.config)(hidden_size=8, num_attention_heads=1, image_size=16))
    with pytest.raises(UpcyclingError, match=r"gives 8 numbers .* takes 16"):
        clip_pool(clips, {"pets": str(data)}).evaluate(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 4}, "Unknown option of CLIPVisionModelTaskPool"),
        ({"test_datasets": {}}, r"taskpool\.test_datasets is empty"),
        ({"test_datasets": {"average": "x"}}, "average is a name of the report"),
        ({"base_model": None}, r"Set taskpool\.base_model"),
        ({"layer_wise_feature_save_path": "x"}, "features are not saved here"),
        ({"dataloader_kwargs": {"drop_last": True}}, "would leave images out"),
        ({"dataloader_kwargs": {"batchsize": 4}}, "Did you mean 'batch_size'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        CLIPVisionModelTaskPool(**{"test_datasets": {"a": "x"}, "base_model": "y", **options})
    if "base_model" not in options and "layer" not in str(options):
        with pytest.raises(UpcyclingError, match=message.replace("CLIPVisionModel", "ImageClas.*")):
            ImageClassificationTaskPool(**{"test_datasets": {"a": "x"}, **options})


def test_models_of_text_and_unknown_names_are_refused(tmp_path: Path) -> None:
    t5(0).save_pretrained(tmp_path / "t5")
    pool = CLIPVisionModelPool({"a": str(tmp_path / "t5")})
    with pytest.raises(UpcyclingError, match=r"modelpool\.models\.a: a T5Model takes no images"):
        pool.load_model("a")
    with pytest.raises(UpcyclingError, match="Unknown model of the pool 'b'"):
        pool.load_model("b")
    pool = CLIPVisionModelPool({"a": "no/such"}, platform="modelscope")
    with pytest.raises(UpcyclingError, match=r"models\.a: Could not resolve checkpoint: no/such"):
        pool.load_model("a")


# --- runs -----------------------------------------------------------------------------------------

#: Arguments, and FusionBench's own algorithm.
METHODS: dict[str, tuple[list[str], Any]] = {
    "simple_average": ([], SimpleAverageAlgorithm()),
    "task_arithmetic": (
        ["method.scaling_factor=0.4"],
        TaskArithmeticAlgorithm(scaling_factor=0.4),
    ),
    "ties_merging": (
        ["method.scaling_factor=0.4", "method.threshold=50"],
        TiesMergingAlgorithm(scaling_factor=0.4, threshold=50, remove_keys=[], merge_func="sum"),
    ),
}


def merged(method: str, models: dict[str, Any]) -> Any:
    """Of models in memory."""
    return METHODS[method][1].run(BaseModelPool(models))


@pytest.fixture(params=["clip", "vit"])
def family(request: pytest.FixtureRequest) -> Iterator[tuple[list[str], dict[str, Any], Any]]:
    """Arguments, models in memory, task pool."""
    data = request.getfixturevalue("data")
    folders = request.getfixturevalue(f"{request.param}s")
    models: dict[str, Any]
    if request.param == "clip":
        models = {name: clip(seed).vision_model for seed, name in enumerate(NAMES)}
        pool: Any = clip_pool(folders, {"pets": str(data)})
        kinds, more = ("CLIPVisionModelPool", "CLIPVisionModelTaskPool"), "taskpool.base_model"
    else:
        models = {name: vit(seed) for seed, name in enumerate(NAMES)}
        pool = vit_pool({"pets": str(data)})
        kinds = ("ImageClassificationModelPool", "ImageClassificationTaskPool")
        more = "modelpool.processor"
    arguments = [
        f"modelpool={kinds[0]}/folders",
        *(f"++modelpool.models.{name}={path}" for name, path in folders.items()),
        f"taskpool={kinds[1]}/local_files",
        f"taskpool.test_datasets={{pets: {data}}}",
        f"{more}={folders['_pretrained_']}",
    ]
    yield arguments, models, pool


@pytest.mark.parametrize("method", METHODS)
def test_merges_of_folders_are_scored_as_merges_in_memory(
    method: str, family: tuple[list[str], dict[str, Any], Any], tmp_path: Path
) -> None:
    arguments, models, pool = family
    result = run(tmp_path / "run", f"method={method}", *METHODS[method][0], *arguments)
    record = json.loads((tmp_path / "run" / "run_record.json").read_text())["taskpool"]
    expected = pool.evaluate(merged(method, models))
    assert result["report"]["pets"] == pytest.approx(expected["pets"], rel=1e-4)
    assert list(result["report"]) == ["pets", "average", "model_info"]
    assert [each["report"] for each in record["evaluations"]] == [result["report"]]
    assert record["config"]["dataloader_kwargs"] == {"batch_size": 128, "num_workers": 0}
    assert json.loads((tmp_path / "run" / "program_report.json").read_text()) == result["report"]


def test_among_several_pools_theirs_and_ours_are_composed(
    clips: dict[str, Path], made_data: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    cfg = compose(
        "taskpool=several",
        "+taskpool@taskpool.pools.theirs=CLIPVisionModelTaskPool/clip-vit-single-task_mnist",
        "taskpool.pools.theirs._target_=fusion_upcycle.taskpool.CLIPVisionModelTaskPool",
        f"taskpool.pools.theirs.base_model={clips['a']}",
        "taskpool.pools.theirs.dataloader_kwargs={num_workers: 0, pin_memory: false}",
        "+taskpool@taskpool.pools.cost=dummy",
    )
    report = SeveralTaskPools(cfg.taskpool.pools).evaluate(clip(1).vision_model)
    assert report["theirs"]["mnist"]["examples"] == 3
    assert "model_info" in report["cost"]


# --- MoEs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_an_moe_of_ours_is_loaded_and_scored_as_what_it_was_made_of(
    kind: str,
    clips: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = clip(1).vision_model if kind == "clip" else vit(1)
    dense.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", num_experts=4, experts_per_token=2)
    # As in a process that knows none of our classes yet.
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    if kind == "clip":
        pool: Any = clip_pool(clips, {"pets": str(data)})
        models: Any = CLIPVisionModelPool({"moe": str(tmp_path / "moe")})
    else:
        pool = vit_pool({"pets": str(data)})
        models = ImageClassificationModelPool({"moe": str(tmp_path / "moe")})
    moe = models.load_model("moe")
    assert moe.num_parameters() > 1.5 * dense.num_parameters()
    assert pool.evaluate(moe)["pets"] == pytest.approx(pool.evaluate(dense)["pets"], rel=1e-4)
