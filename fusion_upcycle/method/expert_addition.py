"""One more expert for a merged model, as a FusionBench method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseModelPool
from fusion_bench.mixins import auto_register_config

from fusion_upcycle.addition.run import add_expert
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.merging.merging import BASE
from fusion_upcycle.method.arguments import sort_arguments
from fusion_upcycle.method.conversion import ConversionAlgorithm, InMemory
from fusion_upcycle.method.pool import PooledFolder, plain, require_pretrained
from fusion_upcycle.method.spelling import spelled_by_maker
from fusion_upcycle.verification.proof import resolve_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@auto_register_config
class ExpertAdditionAlgorithm(ConversionAlgorithm):
    """One more expert for `_pretrained_`, a model merged with `statistics=true`.

    The pool's other model gives its FFNs, and its name. See `fusion_upcycle.add_expert`.

    Args:
        data: texts of the new model, see `fusion_upcycle.texts.documents`.
        save_checkpoint: folder to write.
        verify: `auto`, `layers`, `logits` or `none`; see `fusion_upcycle.merge_into_moe`.
        return_model: False skips loading the result.
        overwrite: replace an earlier output of ours at `save_checkpoint`.
        max_shard_size: of the files.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload `save_checkpoint` to.

    Raises:
        UpcyclingError: an option that cannot be used; `run` raises it for the models.
    """

    @spelled_by_maker
    def __init__(
        self,
        data: Any,
        save_checkpoint: str,
        *,
        verify: str = "auto",
        return_model: bool = True,
        overwrite: bool = False,
        max_shard_size: int | str = "5GB",
        push_to_hub: str | None = None,
        **kwargs: Any,
    ):
        keys, _ = sort_arguments(self, kwargs)
        super().__init__(**keys)
        self._data = plain(data)
        for name, value in (("data", data), ("save_checkpoint", save_checkpoint)):
            if value is None:
                raise UpcyclingError(
                    "An expert is added with texts of its model, into a folder: set "
                    f"{setting(name, 'PATH')}."
                )
        resolve_mode(verify, streaming=True)
        self._writing = self._output_options(overwrite, max_shard_size, push_to_hub)

    def _names(self, pool: BaseModelPool) -> Sequence[str]:
        require_pretrained(pool)
        if len(pool.model_names) != 1:
            raise UpcyclingError(
                f"One expert is added at a time, and the model pool has {list(pool.model_names)} "
                f"beside {BASE}, the merged model. Leave one."
            )
        return [BASE, *pool.model_names]

    def _stream(self, folders: Mapping[str, PooledFolder], output: Path) -> Converted:
        (name,) = (name for name in folders if name != BASE)
        model, new = folders[BASE].source, folders[name].source
        return add_expert(model, new, output, data=self._data, name=name, **self._how)

    def _convert(
        self, models: "Mapping[str, PreTrainedModel]", tokenizer_file: Path | None
    ) -> InMemory:
        raise UpcyclingError(
            "The router statistics of a merged model are in its folder: give a model pool that "
            "names the folders of both models, as modelpool=CausalLMPool/folders does."
        )
