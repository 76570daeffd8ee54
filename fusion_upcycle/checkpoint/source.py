"""Where a dense model comes from: a local folder or a Hub id, its config and companion files."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_upcycle.checkpoint.minicpm import granite_fields
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Files that belong to the model as they are: tokenizer, chat templates, generation, licences.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "additional_chat_templates/*.jinja",
)


def locate(source: str | Path) -> Path:
    """The local folder of `source`, downloading a Hub id's safetensors if need be.

    Raises:
        UpcyclingError: neither a folder nor a Hub id that can be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UpcyclingError(f"{source} is a file. Give the folder that holds config.json.")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(source)):
        raise UpcyclingError(f"{source} does not exist, and is not a Hugging Face Hub id either.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(source),
                allow_patterns=["config.json", "*.safetensors", "*.index.json", *COMPANIONS],
                # Some repositories hold the same weights a second time, in their maker's layout.
                ignore_patterns=["consolidated*", "*.bin.index.json", "*/*.safetensors"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UpcyclingError(
            f"{source} is not a folder here, and the Hugging Face Hub did not give it: {error}"
        ) from error


def read_config(folder: Path) -> "PreTrainedConfig":
    """The config of a model that transformers knows; never runs code from the folder.

    Raises:
        UpcyclingError: no config.json, a damaged one, or one of a model that transformers does not
            know.
    """
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise UpcyclingError(
            f"{folder} has no config.json."
            + (" It is a PEFT adapter: merge it into its base model first." if adapter else "")
            + " Give a Hugging Face model folder."
        )
    try:
        data = json.loads(path.read_bytes())
        model_type = data["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpcyclingError(
            f"{path} cannot be read as a model's config: {error!r}. Fetch or save the model again."
        ) from error
    from transformers import AutoConfig, GraniteConfig

    try:
        if model_type == "minicpm":
            return GraniteConfig(**granite_fields(data))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UpcyclingError:
        raise
    except Exception as error:  # transformers' checks raise a class of their own for each field
        raise UpcyclingError(
            f"transformers refuses {path} (model_type {model_type}): {error}"
        ) from error


def check_companions(source: Path) -> None:
    """Refuse a damaged JSON file before it is copied into an output that is called proven."""
    for path in _companions(source):
        if path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise UpcyclingError(f"{path} is damaged ({error}). Download it again.") from error


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
    paths = (path for pattern in COMPANIONS for path in sorted(source.glob(pattern)))
    return [path for path in paths if path.is_file()]
