"""What a FusionBench model pool says about its dense model: where it is, in which dtype."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_bench import BaseModelPool
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.utils import LazyStateDict
from omegaconf import DictConfig, ListConfig, OmegaConf
from transformers.utils.peft_utils import find_adapter_config_file

from fusion_upcycle.checkpoint.adapter_config import read_adapter_config
from fusion_upcycle.checkpoint.located import is_adapter, locate_model
from fusion_upcycle.conversion.adapted import open_model, put_on
from fusion_upcycle.demo.texts import demo_documents
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.files import by_name
from fusion_upcycle.live.loading import load_by_config, require_findable

#: Keywords that FusionBench gives to every class of its configs.
FUSION_BENCH_KEYS = ("_recursive_", "_usage_", "_version_")
_DTYPE_KEYS = ("torch_dtype", "dtype")
_LOADERS = (
    "transformers.AutoModelForCausalLM",
    "transformers.AutoModelForCausalLM.from_pretrained",
    "peft.AutoPeftModelForCausalLM.from_pretrained",
)


@dataclass(frozen=True)
class PooledFolder:
    """A dense model that a pool names by folder or Hub id, so that it can be streamed.

    Attributes:
        source: folder or Hub id, of a model or of an adapter.
        dtype: in which it is loaded.
        options: all that it is loaded with.
    """

    source: str
    dtype: Any
    options: Mapping[str, Any] = field(default_factory=dict)


def require_pretrained(pool: BaseModelPool) -> None:
    """Refuse a pool without `_pretrained_`, the model to be upcycled."""
    if not pool.has_pretrained:
        raise UpcyclingError(
            "The model pool has no '_pretrained_' model, the one to be upcycled; it has "
            f"{list(pool.all_model_names)}. Set modelpool.models._pretrained_=PATH_OR_HUB_ID."
        )


def pooled_folder(
    pool: BaseModelPool, name: str = "_pretrained_", *, streaming: bool = True
) -> PooledFolder | None:
    """The folder or Hub id of a model; None where the pool makes the model otherwise.

    Raises:
        UpcyclingError: a folder that is not there; a loading option that streaming cannot honour,
            by name.
    """
    found = _causal(pool, name) if isinstance(pool, CausalLMPool) else None
    if found is not None:
        require_findable(found[0], f"modelpool.models.{name}")
    if hasattr(pool, "named_folder"):  # ours
        found = pool.named_folder(name)
    if found is None:
        return None
    source, kwargs = found
    for option, value in kwargs.items():
        if streaming and option not in _DTYPE_KEYS and value is not None:
            raise UpcyclingError(
                f"modelpool option {option}={value!r} cannot be honoured when streaming to "
                "method.save_checkpoint. Remove it, or pass "
                f"{setting('save_checkpoint', None)} to convert in memory."
            )
    dtype = next((kwargs[key] for key in _DTYPE_KEYS if kwargs.get(key)), None)
    return PooledFolder(source, None if dtype == "auto" else dtype, kwargs)


def load_pooled(
    pool: BaseModelPool, name: str, found: PooledFolder | None, base: str | None
) -> Any:
    """A model of a pool in memory; an adapter as its base with the adapter on it.

    Args:
        found: its folder, if the pool names one.
        base: folder or Hub id of the model that adapters are put on; None is what they name.

    Raises:
        UpcyclingError: an adapter that cannot be used, or one that the pool has put on by itself.
    """
    if found is not None and _names_adapter(found.source):
        at = locate_model(found.source, base)
        model = load_by_config(at.folder, **found.options)
        put_on(model, open_model(at)[1])
        return model
    model = load_eagerly(pool, name)
    if any(".lora_" in tensor for tensor in getattr(model, "state_dict", dict)()):
        raise UpcyclingError(
            f"modelpool.models.{name} is a model with an adapter that is not merged into its "
            f"weights. Name the adapter's folder in its place: modelpool.models.{name}=FOLDER; or "
            "merge it (merge_and_unload)."
        )
    return model


def load_eagerly(pool: BaseModelPool, name: str) -> Any:
    """A model of a pool, also of one that would give a mapping of lazy tensors in its place.

    Raises:
        UpcyclingError: a lazy mapping of a folder that cannot be loaded.
    """
    # A flag of FusionBench's own configs. Such a pool takes its entries apart: they load once.
    if getattr(pool, "enable_lazy_loading", False):
        found = pooled_folder(pool, name, streaming=False)
        if found is not None:
            return load_by_config(found.source, **found.options)
    return made_whole(pool.load_model(name))


def made_whole(model: Any) -> Any:
    """The model of FusionBench's mapping of lazy tensors; any other as it is.

    Tensors that were set in the mapping count before those of its folder.

    Raises:
        UpcyclingError: a folder that cannot be loaded.
    """
    if not isinstance(model, LazyStateDict):
        return model
    dtype = model._torch_dtype
    made = load_by_config(model._local_path, **({} if dtype is None else {"dtype": dtype}))
    if model._state_dict_cache:
        made.load_state_dict(model._state_dict_cache, strict=False)
    return made


def own_folders(folders: Mapping[str, PooledFolder], bases: Mapping[str, str]) -> list[str]:
    """Where the models' own tokenizers are; of adapters, also what they are put on."""
    named = [folder.source for folder in folders.values()]
    for source in list(named):
        if is_adapter(path := Path(source).expanduser()):
            named += [base] if (base := read_adapter_config(path).base) else []
    return [*named, *bases.values()]


def _names_adapter(source: str) -> bool:
    path = Path(source).expanduser()
    if path.is_dir():
        return is_adapter(path)
    return find_adapter_config_file(source) is not None


def _causal(pool: CausalLMPool, name: str) -> tuple[str, Mapping[str, Any]] | None:
    """Folder or Hub id, and options of loading."""
    entry, kwargs = pool._models[name], plain(pool.model_kwargs)
    source = entry
    if isinstance(entry, DictConfig | dict):
        entry = dict(plain(entry))
        if entry.pop("_target_", None) not in _LOADERS:
            return None
        source = entry.pop("pretrained_model_name_or_path", None)
        kwargs = entry | kwargs
    return (source, kwargs) if isinstance(source, str) else None


def require_own_tokenizer(pool: BaseModelPool, sources: Collection[str]) -> None:
    """Refuse a pool whose tokenizer is not that of the models, whose files will be copied."""
    tokenizer = getattr(pool, "tokenizer", None)
    if isinstance(tokenizer, DictConfig | dict):
        tokenizer = tokenizer.get("pretrained_model_name_or_path")
    if tokenizer is not None and tokenizer not in sources:
        raise UpcyclingError(
            f"modelpool.tokenizer={tokenizer} is not the model's own ({', '.join(sources)}), whose "
            "files would be copied to method.save_checkpoint. Set modelpool.tokenizer to the "
            f"model's folder or null, or pass {setting('save_checkpoint', None)} to convert in "
            "memory."
        )


def tokenizer_file(pool: BaseModelPool) -> Path | None:
    """`tokenizer.json` of the pool's tokenizer, where that is a local folder."""
    folder = getattr(pool, "tokenizer", None)
    return Path(folder).expanduser() / "tokenizer.json" if isinstance(folder, str) else None


def named_texts(data: Any, split: str, where: str) -> dict[str, Any] | None:
    """Texts by name, as `texts.documents` takes them; the shipped ones for `demo`.

    A path alone goes by its own name.

    Raises:
        UpcyclingError: something else than a mapping or `demo`.
    """
    data = plain(data)
    if data == "demo":
        return demo_documents(split)
    data = by_name(data)
    if data is not None and not isinstance(data, Mapping):
        raise UpcyclingError(
            f"{where}={data!r} must be a mapping, {{name: file}}, a path, or demo for the shipped "
            "text."
        )
    return None if data is None else dict(data)


def plain(value: Any) -> Any:
    """Plain Python for a config node; anything else as it is."""
    is_config = isinstance(value, DictConfig | ListConfig)
    return OmegaConf.to_container(value, resolve=True) if is_config else value
