"""Where a dense model comes from: a local folder or a Hub id, its config and companion files."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checkpoint.config_bounds import check_labels, check_values, without_orders
from fusion_upcycle.checkpoint.minicpm import granite_fields
from fusion_upcycle.checkpoint.peft import CONFIG_FILE, merge_command
from fusion_upcycle.checkpoint.tokenizer_file import check_tokenizer
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.untrusted import LARGE, read_bytes, read_json, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Files that belong to the model as they are: tokenizer, chat templates, generation, licences.
COMPANIONS = (
    "tokenizer*",  # .json, .model, .model.v3, ...
    "*tokenizer*.json",
    "*_tokens*.json",
    "*_tokens*.txt",
    "*vocab*",
    "*merges*",
    "*.bpe",
    "*.model",  # sentencepiece's
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "tekken.json",
    "spiece.*",
    "dict.txt",
    "bpe.codes",
    "byte_maps.json",
    "emoji.*",
    "normalizer.json",
    "*chat_template*",
    "*.jinja",
    "*processor*.json",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "chat_templates/*",
    "additional_chat_templates/*",
)

#: Endings of what is code, weights or a part of training, whatever its name: never carried.
_NOT_CARRIED = re.compile(
    r"\.(py|pyc|sh|so|exe|bin|pt|pth|pkl|pickle|ckpt|safetensors|gguf|onnx|h5|msgpack|ot|npz|npy|"
    r"tflite|mlmodel|joblib|zip|tar|gz|tgz)$|\.(safetensors|bin)\.index\.json$",
    re.IGNORECASE,
)


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of `source`, downloading a Hub id's safetensors if need be.

    Args:
        source: folder or Hub id.
        revision: of a Hub id; None is its main one.

    Raises:
        UpcyclingError: neither a folder nor a Hub id that can be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UpcyclingError(f"{source} is a file. Give the folder that holds config.json.")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(source)):
        raise UpcyclingError(
            f"{path.absolute()} does not exist, and {source} is not a Hugging Face Hub id either."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=[
                    "config.json",
                    "README.md",
                    CONFIG_FILE,
                    "*.safetensors",
                    "*.index.json",
                    *COMPANIONS,
                ],
                # Some repositories hold the same weights a second time, in their maker's layout.
                ignore_patterns=[
                    "consolidated*",
                    "*.bin.index.json",
                    "*/*.safetensors",
                    *("*.py", "*.bin", "*.pt", "*.onnx"),  # see `_NOT_CARRIED`
                ],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UpcyclingError(
            f"{source} is not a folder here ({path.absolute()}), and the Hugging Face Hub did not "
            f"give it: {error}"
        ) from error


def read_config(folder: Path) -> "PreTrainedConfig":
    """The config of a model that transformers knows; never runs code from the folder.

    Raises:
        UpcyclingError: no config.json, a damaged one, or one of a model that transformers does not
            know.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / CONFIG_FILE).is_file():
            raise UpcyclingError(
                f"{folder} is a PEFT adapter (no config.json), which upcycle, merge, add-expert, "
                f"inspect and verify take as it is. For others, merge it: {merge_command(folder)}."
            )
        raise UpcyclingError(f"{folder} has no config.json. Give a Hugging Face model folder.")
    if (beside := folder / "adapter_config.json").is_file():
        raise UpcyclingError(
            f"{beside} is a PEFT adapter beside the model, which transformers would put on top of "
            "it. Merge it into the weights (merge_and_unload), or move it to another folder."
        )
    data = _config_data(path)
    model_type = data.get("model_type")
    if not isinstance(model_type, str):
        raise UpcyclingError(f"{path} cannot be read as a model's config: it names no model_type.")
    check_values(path, data)
    from transformers import CONFIG_MAPPING, GraniteConfig

    data = without_orders(data)
    check_labels(path, data)
    import fusion_upcycle.models  # noqa: F401  whose classes are known from here on

    try:
        if model_type == "minicpm":
            return GraniteConfig(**granite_fields(data))
        if model_type not in CONFIG_MAPPING:
            raise UpcyclingError(
                f"transformers refuses {path}: it knows no model_type {model_type!r}. If the model "
                "brings code of its own, that is never run here."
            )
        config_class = CONFIG_MAPPING[model_type]
        # Real files say 0 where the class wants 0.0.
        for name, value in data.items():
            if type(value) is int and isinstance(getattr(config_class, name, None), float):
                data[name] = float(value)
        return config_class.from_dict(data)
    except UpcyclingError:
        raise
    except Exception as error:  # transformers' checks raise a class of their own for each field
        raise UpcyclingError(
            f"transformers refuses {path} (model_type {model_type}): {error}"
        ) from error


def orders_code(folder: Path) -> bool:
    """Whether a folder's config.json says by which code a model is to be run.

    Raises:
        UpcyclingError: a damaged one.
    """
    path = folder / "config.json"
    data = _config_data(path) if path.is_file() else {}
    return bool(without_orders(data) != data)


def _config_data(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except UpcyclingError as error:
        raise UpcyclingError(f"{path} cannot be read as a model's config: {error}") from error


def check_companions(source: Path) -> None:
    """Look at the files that are copied, before they are in an output that is called proven.

    Raises:
        UpcyclingError: a damaged JSON file, or a link that leads out of the folder: what it shows
            is not the model's.
    """
    # The Hub's cache holds the files themselves beside its snapshots.
    allowed = [source.resolve(), (source / "../../blobs").resolve()]
    for path in _companions(source):
        real = path.resolve()
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise UpcyclingError(
                f"{path} is a link to {real}, outside of the model's folder, and would be copied. "
                "Put a copy in its place if it belongs to the model, or remove it."
            )
        if path == source / "tokenizer.json":
            check_tokenizer(path)
        elif path.suffix == ".json":
            read_json(path, LARGE)
        else:
            read_bytes(path, LARGE)


def copy_companions(source: Path, output: Path) -> list[str]:
    """Copy tokenizer, template, generation and licence files as they are; returns their names."""
    copied = []
    for path in _companions(source):
        target = output / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)  # follows the Hub cache's links
        copied.append(str(path.relative_to(source)))
    return copied


def _companions(source: Path) -> list[Path]:
    paths = {path: None for pattern in COMPANIONS for path in sorted(source.glob(pattern))}
    return [
        path
        for path in paths
        if path.is_file() and not path.name.startswith(".") and not _NOT_CARRIED.search(path.name)
    ]
