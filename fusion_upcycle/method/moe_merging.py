"""MoE merging: any supported family, and Mixtral under FusionBench's own class names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseModelPool
from fusion_bench.mixins import auto_register_config

from fusion_upcycle.checkpoint.located import locate_model
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checks import AUTO
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.merging.companions import Companions
from fusion_upcycle.merging.merging import BASE
from fusion_upcycle.merging.options import MergingOptions, make_merging_options
from fusion_upcycle.merging.plan import expert_models, main_model
from fusion_upcycle.merging.run import (
    agree_on_files,
    base_among_models,
    merge_into_moe,
    plan_models,
)
from fusion_upcycle.method.arguments import sort_arguments, takes_options
from fusion_upcycle.method.conversion import ConversionAlgorithm, InMemory
from fusion_upcycle.method.pool import PooledFolder, made_whole, plain
from fusion_upcycle.method.spelling import spelled_by_maker
from fusion_upcycle.texts.documents import named_documents
from fusion_upcycle.verification.proof import resolve_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@auto_register_config
@takes_options(MergingOptions)
class MoEMergingAlgorithm(ConversionAlgorithm):
    """Merging of a pool's models, causal LMs or backbones, into one Mixture-of-Experts model.

    Each model gives its FFNs as experts; all else is the models' mean, or that of `_pretrained_`.

    Args:
        experts_per_token: as the others, see `options`.
        save_checkpoint: folder to write; None keeps the result in memory only.
        calibration: for `router_init=prototype`, model -> its texts, see
            `fusion_upcycle.texts.documents`.
        verify: `auto`, `layers`, `logits` or `none`; see `fusion_upcycle.merge_into_moe`.
        return_model: False skips loading a streamed result.
        overwrite: replace an earlier output of ours at `save_checkpoint`.
        max_shard_size: of the files.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload `save_checkpoint` to.
        options: those of `fusion_upcycle.merging.options.MergingOptions`; the base model is
            `_pretrained_`. Initialisers may also be config nodes with `_target_`, and `dtype` is
            that of the pool before it is the models'.

    Raises:
        UpcyclingError: an option that cannot be used; `run` raises it for the models.
    """

    _elsewhere = (
        "Backbones go into MixtralMoEMergingAlgorithm, causal language models into "
        "MixtralForCausalLMMergingAlgorithm."
    )

    def __init__(
        self,
        experts_per_token: int,
        save_checkpoint: str | None = None,
        *,
        calibration: Mapping[str, Any] | None = None,
        verify: str = "auto",
        return_model: bool = True,
        overwrite: bool = False,
        max_shard_size: int | str = "5GB",
        push_to_hub: str | None = None,
        **options: Any,
    ):
        keys, given = sort_arguments(self, options)
        super().__init__(**keys)
        self._options = make_merging_options(experts_per_token=experts_per_token, **given)
        self._check_target(self._options.target)
        self._calibration: dict[str, Any] = plain(calibration) or {}
        if not isinstance(self._calibration, Mapping):
            raise UpcyclingError(
                f"method.calibration={calibration!r} must be a mapping, {{model: texts}}."
            )
        if self._options.statistics and save_checkpoint is None:
            raise UpcyclingError(
                f"{setting('statistics', True)} keeps them beside the model, and the result stays "
                f"in memory. Set {setting('save_checkpoint', 'FOLDER')}."
            )
        resolve_mode(verify, streaming=False)
        #: What the models' folders have been found to differ in, where they are loaded of such.
        self._files: Companions | None = None
        self._writing = self._output_options(overwrite, max_shard_size, push_to_hub)

    @spelled_by_maker
    def run(self, modelpool: Any) -> "PreTrainedModel | None":
        """Merge the models of a pool, or models in memory: as `ConversionAlgorithm.run`."""
        with base_among_models():
            return super().run(modelpool)

    def _named(self, model: Any) -> "Mapping[str, PreTrainedModel]":
        return {name: made_whole(each) for name, each in dict(model).items()}

    def _names(self, pool: BaseModelPool) -> Sequence[str]:
        return [*([BASE] if pool.has_pretrained else []), *pool.model_names]

    def _bases(self, folders: Mapping[str, PooledFolder]) -> Mapping[str, str]:
        base = folders.get(BASE)
        return {} if base is None else dict.fromkeys(folders.keys() - {BASE}, base.source)

    def _check_folders(self, folders: Mapping[str, PooledFolder]) -> None:
        bases = self._bases(folders)
        local = {
            name: locate_model(folder.source, bases.get(name)).folder
            for name, folder in folders.items()
        }
        configs = {name: read_config(folder) for name, folder in local.items()}
        if local:
            self._files = agree_on_files(local, configs, main_model(configs, self._options))

    def _stream(self, folders: Mapping[str, PooledFolder], output: Path) -> Converted:
        expert_models(folders, self._options)
        dtypes = {str(folder.dtype): folder.dtype for folder in folders.values()}
        if len(dtypes) > 1 and self._options.dtype is None:
            raise UpcyclingError(
                f"The pool loads its models in different dtypes ({', '.join(sorted(dtypes))}). "
                f"Choose one, as in {setting('dtype', 'bfloat16')}."
            )
        dtype = next(iter(dtypes.values()))
        return merge_into_moe(
            {name: folder.source for name, folder in folders.items()},
            output,
            calibration=self._calibration,
            **self._how,
            **vars(self._options) | {"dtype": self._options.dtype or dtype},
        )

    def _convert(
        self, models: "Mapping[str, PreTrainedModel]", tokenizer_file: Path | None
    ) -> InMemory:
        merging = plan_models(
            models,
            self._options,
            texts=named_documents(self._calibration),
            tokenizer_file=tokenizer_file,
            notes=None if self._files is None else self._files.notes,
            progress=self._writing.progress,
        )
        moe, proof = to_model(
            merging,
            models[merging.main],
            verify=self.verify,
            tokenizer_file=tokenizer_file,
            progress=self._writing.progress,
        )
        if self._files is not None and self._files.generation is not None:
            moe.generation_config.update(**self._files.generation)
        return InMemory(moe, merging, proof, put=merging.put_beside)


class MixtralForCausalLMMergingAlgorithm(MoEMergingAlgorithm):
    """Llama or Mistral causal LMs to one `MixtralForCausalLM`; options as in its base."""

    _accepted = ("LlamaForCausalLM", "MistralForCausalLM")
    _targets = (AUTO, "mixtral")


class MixtralMoEMergingAlgorithm(MoEMergingAlgorithm):
    """Backbones, `LlamaModel` or `MistralModel`, to one `MixtralModel`; options as in its base."""

    _accepted = ("LlamaModel", "MistralModel")
    _targets = (AUTO, "mixtral")
