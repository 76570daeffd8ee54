"""Analyse live models and folders, and compare two states of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusion_upcycle.analysis.collect import collect, moe_routers
from fusion_upcycle.analysis.information import domain_information, information_gain
from fusion_upcycle.analysis.routing import RoutingCounts
from fusion_upcycle.analysis.similarity import similarity_to_json
from fusion_upcycle.architectures.layout import model_class, takes_images
from fusion_upcycle.checkpoint.source import locate, read_config
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.experts import find_experts
from fusion_upcycle.live.loading import load_folder
from fusion_upcycle.live.routers import Routers
from fusion_upcycle.report.progress import loading_bars
from fusion_upcycle.texts.documents import load_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 20_000
#: Tokens whose router inputs all experts are given, for CKA.
SAMPLE = 512
PERMUTATIONS = 2000


@dataclass(frozen=True)
class Analysis:
    """What was found in one model.

    Attributes:
        record: JSON, the section `analysis` of a run record, from which tables and figures are
            made. `config`, `model`, `domains`, `token_classes` (none of images) and `cka_tokens`
            say what was run;
            `layers` has the statistics of `RoutingCounts.to_json` and of `similarity_to_json`;
            `information` that of `domain_information`, None with one domain.
        counts: where tokens went.
    """

    record: dict[str, Any]
    counts: RoutingCounts


def analyze(
    model: "PreTrainedModel",
    processor: Any,
    data: Mapping[str, Sequence[Any]],
    *,
    tokens: int = TOKENS,
    sample: int = SAMPLE,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: bool = False,
) -> Analysis:
    """What the experts of a model do with texts, or images, of several domains.

    Args:
        model: live MoE of a family in `fusion_upcycle.architectures`.
        processor: the model's tokenizer or image processor.
        data: domain -> documents, or images of PIL. The encoder of a T5 is given the first half of
            each window of text, and its decoder the second.
        tokens: of each domain at most; of images, spread over all of a domain, one at least.
        sample: tokens for CKA.
        permutations: of domain labels, at least 1.
        seed: of the permutations.
        progress: show a bar.

    Raises:
        UpcyclingError: a dense model, an unknown family, or data that cannot be used.
    """
    if sample < 2 or permutations < 1:
        raise UpcyclingError(
            f"sample={sample} must be 2 or more, and permutations={permutations} 1 or more."
        )
    routers = moe_routers(model)
    experts = find_experts(model, routers)
    try:
        found = collect(
            model, routers, processor, data, tokens=tokens, sample=sample, progress=progress
        )
    finally:
        routers.close()
    counts = found.counts
    information = domain_information(
        counts.unit_LDUE, counts.layers, permutations=permutations, seed=seed
    )
    record = {
        "config": {"tokens": tokens, "sample": sample, "permutations": permutations, "seed": seed},
        "model": _described(model, routers),
        "domains": found.material.domains,
        "token_classes": counts.class_tokens(),
        "cka_tokens": min(map(len, found.inputs.values())),
        "layers": {
            layer: statistics | similarity_to_json(experts[int(layer)], found.inputs[int(layer)])
            for layer, statistics in counts.to_json().items()
        },
        "information": information and {"unit": found.material.unit, **information},
    }
    return Analysis(record, counts)


def _described(model: "PreTrainedModel", routers: Routers) -> dict[str, Any]:
    config = model.config.get_text_config()
    routing = getattr(config, "moe_routing", "token_choice")
    by_experts = routing == "expert_choice"
    mean = sum(routers.experts_on_average.values()) / len(routers.layers)
    return {
        "model_type": config.model_type,
        "num_experts": routers.num_experts,
        "experts_per_token": mean if by_experts else routers.experts_per_token,
        **({} if routing == "token_choice" else {"routing": routing}),
    }


def analyze_folder(
    folder: str | Path,
    data: Mapping[str, Sequence[Any]],
    *,
    tokens: int = TOKENS,
    progress: bool = False,
) -> Analysis:
    """`analyze` of a folder or Hub id, on a GPU if there is one.

    Raises:
        UpcyclingError: no model, tokenizer or image processor there; what `analyze` cannot use.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    path = locate(folder)
    kind, images = _class_of(path)
    what, auto = ("image processor", AutoImageProcessor) if images else ("tokenizer", AutoTokenizer)
    try:
        processor = auto.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UpcyclingError(f"{path} has no {what} that can be read: {error}") from error
    with loading_bars(progress):
        model = load_folder(kind, path, dtype="auto")
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    analysis = analyze(model, processor, data, tokens=tokens, progress=progress)
    analysis.record["model"] = {"path": str(path), **analysis.record["model"]}
    return analysis


def _class_of(folder: Path) -> tuple[Any, bool]:
    """The model class of a folder, and whether it takes images."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    if not config.architectures:  # of a causal LM that was saved by other hands
        return AutoModelForCausalLM, False
    return model_class(config.architectures[0]), takes_images(config)


def read_data(folder: str | Path, sources: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Texts or images of each `NAME=PATH`, as the model of a folder or Hub id takes them.

    Raises:
        UpcyclingError: as `read_texts` and `read_images`; no model there.
    """
    _, images = _class_of(locate(folder))
    return {**(read_images(sources) if images else read_texts(sources))}


def read_images(sources: Sequence[str]) -> dict[str, "ImageFiles"]:
    """All images below the folder, or the image file, of each `NAME=PATH`.

    Raises:
        UpcyclingError: not of that form, a name that comes twice, or no images.
    """
    return {name: ImageFiles.of(Path(path).expanduser()) for name, path in _pairs(sources).items()}


@dataclass(frozen=True)
class ImageFiles(Sequence[Any]):
    """Image files, opened when they are asked for."""

    files: Sequence[Path]

    @classmethod
    def of(cls, path: Path) -> "ImageFiles":
        """All below a folder, hidden ones aside; or one file.

        Raises:
            UpcyclingError: there is no image.
        """
        from PIL import Image

        known = {*Image.registered_extensions()}
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [
            f for f in inside if f.is_file() and f.suffix.lower() in known and f.name[0] != "."
        ]
        if not files:
            raise UpcyclingError(f"{path} has no images. Give an image file, or a folder of some.")
        return cls(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.files[index]) as image:
                return image.copy()
        except (OSError, UnidentifiedImageError) as error:
            raise UpcyclingError(
                f"{self.files[index]} cannot be read as an image: {error}. Leave it out."
            ) from error


def read_texts(sources: Sequence[str]) -> dict[str, list[str]]:
    """Documents of each `NAME=PATH`; a folder is all files in it, hidden ones aside.

    Raises:
        UpcyclingError: not of that form, a name that comes twice, or no text.
    """
    return {
        name: load_documents(text_files(path), f"--data {name}")
        for name, path in _pairs(sources).items()
    }


def _pairs(sources: Sequence[str]) -> dict[str, str]:
    """Name -> path of each `NAME=PATH`."""
    found: dict[str, str] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        if not equals or not name or not path:
            raise UpcyclingError(f"--data {source} must be NAME=FILE_OR_FOLDER.")
        if name in found:
            raise UpcyclingError(f"--data {name} is given twice. Use another name for the second.")
        found[name] = path
    return found


def text_files(path: str) -> str | list[str]:
    """A file as it is; a folder as all files in it, hidden ones aside.

    Raises:
        UpcyclingError: an empty folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    files = [str(f) for f in sorted(folder.iterdir()) if f.is_file() and f.name[0] != "."]
    if not files:
        raise UpcyclingError(
            f"{folder} has no files to read as text. Give a folder of .txt, .jsonl or .parquet."
        )
    return files


def demo_texts() -> dict[str, tuple[str, ...]]:
    """The held-out text of the three demo domains."""
    from fusion_upcycle.demo.texts import DOMAINS, domain_text

    return {domain: domain_text(domain, "test") for domain in DOMAINS}


def compare(before: Analysis, after: Analysis) -> dict[str, Any]:
    """Two states of one model side by side: did copies diverge, and did experts specialise?

    Args:
        before: on the same texts, with as many experts in the same layers.
        after: its number of permutations and seed are used.

    Returns:
        JSON: `before` and `after`, layer -> `weight_cosine` and `output_cka`, means over pairs of
        different experts, `load_cv` and `dead_experts`; and `information`, see `information_gain`.

    Raises:
        UpcyclingError: analyses of models or texts that do not compare.
    """
    one, other = before.record, after.record
    for what, first, second in (
        ("experts", one["model"]["num_experts"], other["model"]["num_experts"]),
        ("MoE layers", list(one["layers"]), list(other["layers"])),
        ("texts", one["domains"], other["domains"]),
    ):
        if first != second:
            raise UpcyclingError(
                f"Before and after do not compare: their {what} are {first} and {second}. "
                "Give two states of one model, on the same texts."
            )
    return {
        "before": _summary(one),
        "after": _summary(other),
        "information": information_gain(
            before.counts.unit_LDUE,
            after.counts.unit_LDUE,
            after.counts.layers,
            permutations=other["config"]["permutations"],
            seed=other["config"]["seed"],
        ),
    }


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        layer: {
            "weight_cosine": found["weight_cosine"]["mean"],
            "output_cka": found["output_cka"]["mean"],
            "load_cv": found["load_cv"],
            "dead_experts": found["dead_experts"],
        }
        for layer, found in record["layers"].items()
    }
