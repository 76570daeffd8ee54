"""FusionBench model pools of vision and sequence-to-sequence models in folders.

FusionBench's own load a folder with a fixed class, or not at all, and take what is missing as
random. Here every folder goes through `fusion_upcycle.live.loading.load_folder`, MoEs too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseModelPool, auto_register_config
from fusion_bench.modelpool import CLIPVisionModelPool as TheirCLIPVisionModelPool
from fusion_bench.modelpool import Seq2SeqLMPool as TheirSeq2SeqLMPool
from fusion_bench.utils import instantiate
from fusion_bench.utils.modelscope import resolve_repo_path
from torch import nn

from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.live.loading import as_folder, load_folder, model_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _FoldersPool(BaseModelPool):
    """Models that are folders or Hub ids, or configs of transformers' own `from_pretrained`.

    A class of ours says which class a plain folder is loaded with. Other entries (models in memory,
    configs of another function) are FusionBench's.
    """

    _model_kwargs: Any = None  # of `from_pretrained`, for every model

    def _class_of(self, folder: str) -> Any:
        raise NotImplementedError

    def _path_of(self, folder: str) -> str:
        return folder

    def named_folder(self, name: str) -> tuple[str, dict[str, Any]] | None:
        """Folder or Hub id of a model and options of loading it, if a folder is all that it is."""
        entry = self._models[name]
        found = None if isinstance(entry, nn.Module) else as_folder(entry)
        if found is None:
            return None
        wanted, folder, own = found
        path = self._path_of(folder)
        if wanted is None and getattr(self._class_of(path), "__name__", "")[:4] != "Auto":
            return None  # a part of what is in the folder
        return path, {**(self._model_kwargs or {}), **own}

    def load_model(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Any:
        """A model of the pool, by its name or by a config.

        Raises:
            UpcyclingError: an unknown name, or a folder that cannot be loaded whole.
        """
        entry = model_name_or_config
        where = "modelpool"
        if isinstance(entry, str):
            if entry not in self._models:
                raise unknown("model of the pool", entry, map(str, self._models))
            where, entry = f"modelpool.models.{entry}", self._models[entry]
        options = {**(self._model_kwargs or {}), **kwargs}
        found = None if isinstance(entry, nn.Module) else as_folder(entry)
        if found is None:
            return super().load_model(model_name_or_config, *args, **options)
        wanted, folder, own = found
        try:
            path = self._path_of(folder)
            model = load_folder(wanted or self._class_of(path), path, **{**options, **own})
            self._check(model)
        except UpcyclingError as error:
            raise UpcyclingError(f"{where}: {error}") from error
        return model

    def _check(self, model: "PreTrainedModel") -> None:
        """Refuse a model of another kind."""


def _takes_images(model: "PreTrainedModel") -> None:
    if model.main_input_name != "pixel_values":
        raise UpcyclingError(f"a {type(model).__name__} takes no images. Give a vision model.")


@auto_register_config
class CLIPVisionModelPool(_FoldersPool, TheirCLIPVisionModelPool):
    """FusionBench's pool of CLIP's vision towers, for dense ones and MoEs.

    Args:
        models: name -> folder or Hub id of a vision tower or of a whole CLIP model, whose tower is
            taken; or as FusionBench takes it. `_pretrained_` is the base model.
        processor: folder or Hub id of a `CLIPProcessor`, or a config that makes one.
        platform: hf or modelscope, where Hub ids are looked for.
        kwargs: of `BaseModelPool`, as data sets.

    `load_model` raises `UpcyclingError` for tensors that a folder lacks, and for models of text.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        *,
        processor: Any = None,
        platform: str = "hf",
        **kwargs: Any,
    ) -> None:
        super().__init__(models, processor=processor, platform=platform, **kwargs)

    def _path_of(self, folder: str) -> str:
        elsewhere = self._platform not in ("hf", "huggingface") or "://" in folder
        if Path(folder).expanduser().is_dir() or not elsewhere:
            return folder
        try:
            return str(resolve_repo_path(folder, repo_type="model", platform=self._platform))
        except OSError as error:
            raise UpcyclingError(f"{error} Give a folder, or another platform.") from error

    def _class_of(self, folder: str) -> Any:
        from transformers import AutoModel, CLIPVisionModel

        return CLIPVisionModel if model_type(folder) == "clip" else AutoModel

    def _check(self, model: "PreTrainedModel") -> None:
        _takes_images(model)


@auto_register_config
class ImageClassificationModelPool(_FoldersPool):
    """Image classifiers with their heads, as `AutoModelForImageClassification` loads them.

    Args:
        models: name -> folder or Hub id, or as FusionBench takes it. `_pretrained_` is the base
            model. To be merged, all have a head of the same shape.
        processor: folder or Hub id of the image processor, which is saved beside a merged model;
            or a config that makes one.
        model_kwargs: of `from_pretrained`, as `dtype`.
        kwargs: of `BaseModelPool`, as data sets.

    `load_model` raises `UpcyclingError` for tensors that a folder lacks.
    """

    _config_mapping = BaseModelPool._config_mapping | {
        "_processor": "processor",
        "_model_kwargs": "model_kwargs",
    }

    def __init__(
        self,
        models: Mapping[str, Any],
        *,
        processor: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(models, **kwargs)
        self._processor = processor
        self._model_kwargs = model_kwargs

    def _class_of(self, folder: str) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def _check(self, model: "PreTrainedModel") -> None:
        _takes_images(model)

    def load_processor(self, *args: Any, **kwargs: Any) -> Any:
        """The image processor.

        Raises:
            UpcyclingError: none was named.
        """
        from transformers import AutoImageProcessor

        if self._processor is None:
            raise UpcyclingError("modelpool.processor is not set: give a folder or Hub id.")
        if isinstance(self._processor, str):
            return AutoImageProcessor.from_pretrained(self._processor, *args, **kwargs)
        return instantiate(self._processor, *args, **kwargs)

    def save_model(self, model: "PreTrainedModel", path: str, *args: Any, **kwargs: Any) -> None:
        """A folder that loads again: the model, and its processor where one was named."""
        model.save_pretrained(path)
        if self._processor is not None:
            self.load_processor().save_pretrained(path)


@auto_register_config
class Seq2SeqLMPool(_FoldersPool, TheirSeq2SeqLMPool):
    """FusionBench's pool of sequence-to-sequence models, for plain folders too.

    FusionBench's own takes configs only, cannot load its tokenizer, and saves bare tensors.

    Args:
        models: name -> folder or Hub id, or as FusionBench takes it. `_pretrained_` is the base
            model.
        tokenizer: folder or Hub id, or a config that makes one; saved beside a merged model.
        model_kwargs: of `from_pretrained`, as `dtype`.
        kwargs: of `BaseModelPool`, as data sets.

    `load_model` raises `UpcyclingError` for tensors that a folder lacks.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        *,
        tokenizer: Any,
        model_kwargs: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(models, tokenizer=tokenizer, model_kwargs=model_kwargs, **kwargs)

    @property
    def tokenizer(self) -> Any:
        """As it was named."""
        return self._tokenizer

    def _class_of(self, folder: str) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer.

        Raises:
            UpcyclingError: none was named.
        """
        from transformers import AutoTokenizer

        if self._tokenizer is None:
            raise UpcyclingError("modelpool.tokenizer is not set: give a folder or Hub id.")
        if isinstance(self._tokenizer, str):
            return AutoTokenizer.from_pretrained(self._tokenizer, *args, **kwargs)
        return instantiate(self._tokenizer, *args, **kwargs)

    def save_model(self, model: "PreTrainedModel", path: str, *args: Any, **kwargs: Any) -> None:
        """A folder that loads again: the model, and its tokenizer where one was named."""
        model.save_pretrained(path)
        if self._tokenizer is not None:
            self.load_tokenizer().save_pretrained(path)
