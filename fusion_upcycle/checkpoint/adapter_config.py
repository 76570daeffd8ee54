"""What the `adapter_config.json` of a PEFT folder says, and whether LoRA is all that it says."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_upcycle.checkpoint.peft import CONFIG_FILE, merge_command
from fusion_upcycle.checkpoint.reader import parse_json
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.untrusted import read_bytes

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"

#: Fields that are read here, or say how the adapter was trained, not what it is.
_KNOWN = re.compile(
    "alpha_pattern|auto_mapping|base_model_name_or_path|bias|ensure_weight_tying|eva_config"
    "|exclude_modules|fan_in_fan_out|inference_mode|init_lora_weights|layers_pattern"
    "|layers_to_transform|loftq_config|lora_alpha|lora_bias|lora_dropout|megatron_core"
    "|modules_to_save|peft_type|peft_version|qalora_group_size|r|rank_pattern|revision"
    "|runtime_config|target_modules|task_type|use_dora|use_rslora|velora_config"
)
#: Ways to begin that leave the base's weights alone; others train on what is left of them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
#: Kinds that put something before the text or between the layers: nothing of it is in a weight.
_WITHOUT_WEIGHTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "POLY",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "XLORA",
)
_MOST_RANK = 2**16
_MOST_ALPHA = 1e9


@dataclass(frozen=True)
class AdapterConfig:
    """A checked `adapter_config.json`; a module goes by its name in the base model.

    Attributes:
        folder: of the adapter.
        base: folder or Hub id of the base model, as the file says; None if it does not.
        revision: of the base on the Hub, as the file says.
        dora: weights have a magnitude of their own.
        lora_bias: biases change with the matrices.
        tying: what is tied was trained together.
        targets: names, or ends of names, of the modules that have a pair of matrices; None where
            the file says it otherwise.
        excluded: names, or ends of names, that have none.
        layers: the only ones that have; None is all.
        said: the whole file.
    """

    folder: Path
    base: str | None
    revision: str | None
    dora: bool
    lora_bias: bool
    tying: bool
    targets: "Sequence[str] | None"
    excluded: Sequence[str]
    layers: "Sequence[int] | None"
    said: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """The rank of a module's pair."""
        return int(_by_pattern(self.said.get("rank_pattern"), module, self.said["r"]))

    def scale(self, module: str) -> float:
        """What the product of a module's pair is multiplied by."""
        alpha = float(_by_pattern(self.said.get("alpha_pattern"), module, self.said["lora_alpha"]))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.said.get("use_rslora") else rank)


def read_adapter_config(folder: Path, base: str | Path | None = None) -> AdapterConfig:
    """Check what an adapter is; nothing but plain LoRA, DoRA and whole tensors can be taken.

    Args:
        base: what it is put on, for the remedies; None is what the file names.

    Raises:
        UpcyclingError: another kind, or a field whose effect is not known here, by name.
    """
    path, said = folder / CONFIG_FILE, _read(folder)
    named = said.get("base_model_name_or_path")
    if named is not None and not (isinstance(named, str) and "\0" not in named):
        raise UpcyclingError(f"{path}: base_model_name_or_path={named!r} is no name of a model.")
    remedy = f"Merge it with PEFT: {merge_command(folder, base)}."
    kind = said.get("peft_type")
    if kind in _WITHOUT_WEIGHTS:
        raise UpcyclingError(
            f"{path}: peft_type={kind} changes no weight of the model, so that there is nothing "
            "to put into experts. Train a LoRA adapter instead, or leave it out."
        )
    if kind != "LORA":
        raise UpcyclingError(f"{path}: peft_type={str(kind)[:40]!r} is not LORA. {remedy}")
    _check_files(folder, remedy)
    for name, value in said.items():
        if not _KNOWN.fullmatch(name) and value not in (None, False, "", [], {}):
            raise UpcyclingError(
                f"{path}: {name}={str(value)[:60]} changes what the adapter does in a way that is "
                f"not known here. {remedy}"
            )
    if (init := said.get("init_lora_weights", True)) not in _INITS:
        raise UpcyclingError(
            f"{path}: with init_lora_weights={str(init)[:40]!r} the base's weights were changed "
            f"before training, and the adapter belongs to what was left of them. {remedy}"
        )
    _check_numbers(path, said)
    layers = said.get("layers_to_transform")
    targets, excluded = (_names(path, said, f"{kind}_modules") for kind in ("target", "exclude"))
    plain = not said.get("layers_pattern") and not isinstance(said.get("exclude_modules"), str)
    return AdapterConfig(
        folder,
        named or None,
        revision if isinstance(revision := said.get("revision"), str) else None,
        dora=bool(said.get("use_dora")),
        lora_bias=bool(said.get("lora_bias")),
        tying=bool(said.get("ensure_weight_tying")),
        targets=targets if plain else None,
        excluded=excluded or (),
        layers=[layers] if isinstance(layers, int) else layers or None,
        said={"r": 8, "lora_alpha": 8} | said,
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    _check_inside(path, folder)
    return parse_json(path, read_bytes(path))


def _check_files(folder: Path, remedy: str) -> None:
    weights = folder / WEIGHTS_FILE
    if weights.is_file():
        _check_inside(weights, folder)
    elif (folder / _PICKLE_FILE).is_file():
        raise UpcyclingError(
            f"{folder / _PICKLE_FILE} is pickled, which can run code when opened. Convert it once: "
            'python -c "import torch; from safetensors.torch import save_file; '
            f"save_file({{n: t.contiguous() for n, t in torch.load('{folder / _PICKLE_FILE}', "
            f"weights_only=True, map_location='cpu').items()}}, '{weights}')\""
        )
    else:
        raise UpcyclingError(
            f"{folder} is an adapter without weights: it has no {WEIGHTS_FILE}. Pickled ones are "
            "not fetched from the Hub: save it again as safetensors (PEFT's save_pretrained)."
        )


def _check_inside(path: Path, folder: Path) -> None:
    """The file is the folder's, or the Hub's cache has it beside its snapshots."""
    real = path.resolve()
    if not any(real.is_relative_to(place.resolve()) for place in (folder, folder / "../../blobs")):
        raise UpcyclingError(
            f"{path} is a link to {real}, outside of the adapter's folder. Put a copy in its place "
            "if it belongs to the adapter."
        )


def _check_numbers(path: Path, said: Mapping[str, Any]) -> None:
    for name in ("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(said.get(name, False), bool | None):
            raise UpcyclingError(f"{path}: {name}={str(said[name])[:60]} must be true or false.")
    ranks, alphas = {"r": said.get("r", 8)}, {"lora_alpha": said.get("lora_alpha", 8)}
    for found, name in ((ranks, "rank_pattern"), (alphas, "alpha_pattern")):
        pattern = said.get(name) or {}
        if not isinstance(pattern, Mapping):
            raise UpcyclingError(f"{path}: {name}={str(pattern)[:60]} must be an object.")
        for key in pattern:
            _check_pattern(path, name, key)
        found |= {f"{name}.{key}": value for key, value in pattern.items()}
    for name, value in ranks.items():
        if type(value) is not int or not 1 <= value <= _MOST_RANK:
            raise UpcyclingError(f"{path}: {name}={str(value)[:60]} is not the rank of an adapter.")
    for name, value in alphas.items():
        if type(value) not in (int, float) or not -_MOST_ALPHA <= value <= _MOST_ALPHA:  # or NaN
            raise UpcyclingError(f"{path}: {name}={str(value)[:60]} is not a number.")
    layers = said.get("layers_to_transform")
    if layers is not None and not all(
        type(layer) is int for layer in (layers if isinstance(layers, list) else [layers])
    ):
        raise UpcyclingError(
            f"{path}: layers_to_transform={str(layers)[:60]} must be whole numbers."
        )


def _check_pattern(path: Path, field: str, pattern: str) -> None:
    """A stranger's regular expression must be one, and end."""
    try:
        re.compile(pattern)
        endless = bool(re.search(r"\)[*+{]", pattern)) or len(re.findall(r"[*+{]", pattern)) > 3
    except (re.error, RecursionError, OverflowError):
        endless = True
    if endless or len(pattern) > 500:
        raise UpcyclingError(
            f"{path}: {field} names modules by {pattern[:60]!r}, which may take for ever to match, "
            "or is no regular expression. Write the modules' names in its place."
        )


def _by_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """As PEFT finds it (`get_pattern_key`): the first pattern that the end of the name matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _names(path: Path, said: Mapping[str, Any], field: str) -> "Sequence[str] | None":
    """A list of names; None for a regular expression, which is not run."""
    found = said.get(field)
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return tuple(found)
    if not isinstance(found, str | None):
        raise UpcyclingError(f"{path}: {field}={str(found)[:60]} must be names of modules.")
    return None
