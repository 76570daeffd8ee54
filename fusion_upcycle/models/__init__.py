"""Our own MoE classes, `Sparse<Dense>`; importing this makes transformers' Auto classes know them.

    import fusion_upcycle.models
    AutoModelForImageClassification.from_pretrained("./vit-moe")   # SparseViTForImageClassification

A family's classes are made when transformers is first asked for its `model_type`: all 52 at once
would take a second.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.models import modeling_sparse
from fusion_upcycle.models.modeling_sparse import FAMILIES, config_class, model_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PREFIX = "sparse_"
#: Auto classes that say less of what a model is for than others that know it.
_GENERAL = ("AutoModelForPreTraining", "AutoModelForMultimodalLM")


class _OnDemand(dict[str, Any]):
    """What transformers' config mapping was told of: ours too, once it asks for one of them."""

    def __contains__(self, name: object) -> bool:
        if not super().__contains__(name) and isinstance(name, str) and name.startswith(_PREFIX):
            _register(name.removeprefix(_PREFIX))
        return super().__contains__(name)


def _register(dense_type: str) -> None:
    """Tell transformers' Auto classes of the sparse classes of one dense family."""
    from transformers import CONFIG_MAPPING

    if dense_type not in FAMILIES or dense_type not in CONFIG_MAPPING:
        return
    dense = CONFIG_MAPPING[dense_type]
    own = config_class(dense)
    own._auto_class = "AutoConfig"  # so that `save_pretrained` ships the modelling file, too
    dict.__setitem__(CONFIG_MAPPING._extra_content, own.model_type, own)
    for auto, kind in _classes(dense):
        made = model_class(kind)
        if auto.__name__ not in _GENERAL:
            made._auto_class = auto.__name__
        auto.register(own, made, exist_ok=True)


def register() -> None:
    """Tell transformers' Auto classes of ours; done by importing this package."""
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING._extra_content
    if not isinstance(known, _OnDemand):
        CONFIG_MAPPING._extra_content = _OnDemand(known)


def save(model: "PreTrainedModel", folder: Path) -> None:
    """`save_pretrained`; of a model of ours with its code, and all that `auto_map` can say."""
    register()
    is_ours = hasattr(model.config, "dense_model_type")
    if is_ours:
        _register(model.config.dense_model_type)
    model.save_pretrained(folder)
    if is_ours:
        file = folder / "config.json"
        said = json.loads(file.read_text(encoding="utf-8")) | {"auto_map": auto_map(model.config)}
        file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def auto_map(config: "PreTrainedConfig") -> dict[str, str]:
    """What `config.json` says of the modelling file that a folder ships, for `trust_remote_code`.

    Args:
        config: of one of our models, with `architectures` set.
    """
    from transformers import CONFIG_MAPPING

    assert config.architectures is not None
    file = modeling_sparse.__name__.rpartition(".")[2]
    own = config.architectures[0]
    dense = CONFIG_MAPPING[config.dense_model_type]
    found = {"AutoConfig": f"{file}.{type(config).__name__}"}
    for auto, kind in _classes(dense):
        if auto.__name__ == "AutoModel" or (
            f"Sparse{kind.__name__}" == own and auto.__name__ not in _GENERAL
        ):
            found[auto.__name__] = f"{file}.Sparse{kind.__name__}"
    return found


def _classes(dense: type) -> Iterator[tuple[Any, Any]]:
    """The Auto classes that know a dense config's class, and what they make of it."""
    from transformers.models.auto import modeling_auto

    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or dense not in mapping:
            continue
        kinds = mapping[dense]
        for kind in kinds if isinstance(kinds, tuple | list) else (kinds,):
            if kind.config_class is dense:
                yield auto, kind
                break


register()
