"""Models of folders, as transformers loads them: what it would draw at random is refused.

transformers fills tensors that a folder lacks with random values and goes on. A dense class given
the folder of an MoE would so lose its FFNs in silence.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from fusion_upcycle import models
from fusion_upcycle.architectures.layout import model_class
from fusion_upcycle.checkpoint.source import orders_code, read_config
from fusion_upcycle.checkpoint.tokenizer_file import check_tokenizer
from fusion_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SHOWN = 3  # tensors that an error names
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load_folder(
    auto_class: Any, folder: str | Path, *, may_lack: Sequence[str] = (), **kwargs: Any
) -> Any:
    """The model of a folder or Hub id, in evaluation mode, with every tensor of it from there.

    Our own MoE classes are known to `auto_class`.

    Args:
        auto_class: of transformers, as `AutoModelForImageClassification`, or a model's own class.
        folder: as `from_pretrained` takes it; `~` is understood.
        may_lack: beginnings of names of tensors that may be missing, as of a head to be trained.
        kwargs: of `from_pretrained`.

    Raises:
        UpcyclingError: no model there that the class can load, a tensor that is missing or of
            another shape, or `trust_remote_code`, which is never done.
    """
    models.register()
    if kwargs.pop("trust_remote_code", False):
        raise UpcyclingError(
            f"trust_remote_code: {folder} would run code of its own. Use a model that transformers "
            "or fusion_upcycle has a class for."
        )
    name = getattr(auto_class, "__name__", str(auto_class))
    if "config" not in kwargs and (config := _own_config(folder, auto_class)) is not None:
        kwargs["config"] = config
    try:
        model, found = auto_class.from_pretrained(
            _source(folder),
            **kwargs
            | {
                "output_loading_info": True,
                "trust_remote_code": False,
                "ignore_mismatched_sizes": True,  # refused below, by name
            },
        )
    except UpcyclingError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(folder, name, error) from error
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(tuple(may_lack)))
    if missing:
        raise UpcyclingError(
            f"{folder} lacks {_some(missing)} of {type(model).__name__}, which would be random. "
            "Give the folder of a model of this class, or the class of this model."
        )
    shapes = [
        f"{key} {tuple(there)}, not {tuple(wanted)}"
        for key, there, wanted in sorted(found["mismatched_keys"], key=lambda each: each[0])
    ]
    if shapes:
        raise UpcyclingError(
            f"{folder} has tensors of another shape than {type(model).__name__}: {_some(shapes)}. "
            "Give the folder as it was saved, and no option that changes its shape."
        )
    return model


def load_by_config(folder: str | Path, **kwargs: Any) -> "PreTrainedModel":
    """The model of a folder or Hub id, of the class that its config names; of CLIP its tower.

    Args:
        folder: as `load_folder` takes it.
        kwargs: of `from_pretrained`.

    Raises:
        UpcyclingError: as `load_folder`, or a config that names no class.
    """
    config = _config(folder)
    names = config.get("architectures") or []
    if len(names) != 1:
        raise UpcyclingError(
            f"config.json of {folder} names no class (architectures). Set it to the one that the "
            "model is of."
        )
    kind = model_class("CLIPVisionModel" if config.get("model_type") == "clip" else names[0])
    model: PreTrainedModel = load_folder(kind, folder, **kwargs)
    return model


def load_processor(folder: str | Path, model: "PreTrainedModel") -> Any:
    """The tokenizer of a folder or Hub id, or its image processor where the model takes images.

    Raises:
        UpcyclingError: there is none.
    """
    from transformers import AutoImageProcessor

    if model.main_input_name != "pixel_values":
        return load_tokenizer(folder)
    return _made(AutoImageProcessor, folder)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder or Hub id.

    Raises:
        UpcyclingError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    path = Path(folder).expanduser()
    pieces = sorted(path.glob("*.model")) if path.is_dir() else []
    needs = pieces and not (path / "tokenizer.json").is_file()
    if needs and find_spec("sentencepiece") is None:  # transformers asks for another package
        raise UpcyclingError(
            f"{path} has its tokenizer in {pieces[0].name} alone, which the package sentencepiece "
            "reads: pip install sentencepiece"
        )
    return _made(AutoTokenizer, folder)


def _made(kind: Any, folder: str | Path) -> Any:
    if (file := Path(folder).expanduser() / "tokenizer.json").is_file():
        check_tokenizer(file)
    try:
        return kind.from_pretrained(_source(folder))
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UpcyclingError):
        raise
    except BaseException as error:  # of a damaged tokenizer a panic, which is no Exception
        raise _unloadable(folder, kind.__name__, error) from error


def model_type(folder: str | Path) -> str:
    """The family that the config of a folder or Hub id names; empty where it names none.

    Raises:
        UpcyclingError: no config there.
    """
    return str(_config(folder).get("model_type", ""))


def _config(folder: str | Path) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(_source(folder))
    except UpcyclingError:
        raise
    except (OSError, ValueError) as error:
        raise _unloadable(folder, "AutoConfig", error) from error
    return config


def as_folder(entry: Any) -> tuple[Any, str, dict[str, Any]] | None:
    """What a config of FusionBench loads from a folder: class, folder and options; None for others.

    Args:
        entry: a folder or Hub id, whose class is then None; or a mapping `{_target_:
            transformers.CLASS.from_pretrained, pretrained_model_name_or_path: FOLDER}`, which
            would load whatever is there.
    """
    from hydra.utils import get_object
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    if isinstance(entry, str | Path):
        return None, str(entry), {}
    target = str(entry.get("_target_", "")) if isinstance(entry, Mapping) else ""
    folder = entry.get("pretrained_model_name_or_path") if target else None
    if not target.endswith(".from_pretrained") or folder is None:
        return None
    method = get_object(target)
    owner = method.__self__ if isinstance(method, MethodType) else None
    if not isinstance(owner, type) or not issubclass(owner, PreTrainedModel | _BaseAutoModelClass):
        return None
    own = ("_target_", "_recursive_", "_convert_", "pretrained_model_name_or_path")
    return owner, str(folder), {str(k): v for k, v in entry.items() if k not in own}


def _source(folder: str | Path) -> str:
    """For `from_pretrained`; what is no folder and cannot be a Hub id is not asked of the Hub."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or not _HUB_ID.fullmatch(str(folder)):
        raise UpcyclingError(
            f"{path.absolute()} is not a folder. Give the one that holds config.json."
        )
    return str(folder)


def _own_config(folder: str | Path, auto_class: Any) -> "PreTrainedConfig | None":
    """The config of a folder that says which code is to run; read without that. None for others."""
    source = Path(_source(folder))
    if not source.is_dir():
        from transformers.utils.hub import cached_file

        try:
            found = cached_file(str(folder), "config.json")
        except OSError:  # which is reported when the model itself is asked for
            return None
        if found is None:
            return None
        source = Path(found).parent
    if not orders_code(source):
        return None
    config, wanted = read_config(source), getattr(auto_class, "config_class", None)
    # A class may be of a part of what is in the folder.
    part = getattr(config, getattr(wanted, "base_config_key", ""), None)
    return part if wanted is not None and isinstance(part, wanted) else config


def require_findable(folder: Any, where: str) -> None:
    """Refuse, before others load it, a path that is not here and that cannot be a Hub id.

    Args:
        folder: what is no text, or another kind of address (`://`), is not looked at.
        where: the option that names it.

    Raises:
        UpcyclingError: with the whole path.
    """
    if not isinstance(folder, str) or "://" in folder:
        return
    try:
        _source(folder)
    except UpcyclingError as error:
        raise UpcyclingError(f"{where}: {error}") from None


def _unloadable(folder: str | Path, name: str, error: BaseException) -> UpcyclingError:
    said = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
    return UpcyclingError(
        f"{folder} cannot be loaded by {name}: {said[:300]}. Give the folder or Hub id of a model "
        "that it can load."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
