"""MoE merging: any supported family, and Mixtral under FusionBench's own class names."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseModelPool
from fusion_bench.mixins import auto_register_config

from fusion_upcycle.checkpoint.source import locate, read_config
from fusion_upcycle.checks import AUTO
from fusion_upcycle.conversion.live import merge_live, save_live
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.merging.options import make_merging_options
from fusion_upcycle.merging.plan import BASE
from fusion_upcycle.merging.run import check_same_tokenizer, describe_merging, merge_into_moe
from fusion_upcycle.method.conversion import ConversionAlgorithm, initialiser, save_companions
from fusion_upcycle.method.pool import (
    PooledFolder,
    plain,
    pooled_folder,
    require_own_tokenizer,
    tokenizer_file,
)
from fusion_upcycle.texts.documents import named_documents
from fusion_upcycle.verification import resolve_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@auto_register_config
class MoEMergingAlgorithm(ConversionAlgorithm):
    """Merging of a pool's models, causal LMs or backbones, into one Mixture-of-Experts model.

    Each model gives its FFNs as experts; all else is the models' mean, or that of `_pretrained_`.

    Args:
        experts_per_token: top-k.
        save_checkpoint: folder to write; None keeps the result in memory only.
        shared: `average` or `base`.
        base_expert: whether `_pretrained_` gives experts too.
        experts_per_model: copies of each model's FFN.
        calibration: for `router_init=prototype`, model -> its texts, see
            `fusion_upcycle.texts.documents`.
        calibration_tokens: of each model's texts that are looked at.
        router_init: `normal`, `zeros`, `prototype`, or a config node with `_target_`.
        target: MoE family, or `auto` to go by the source.
        moe_layers: `all`, `every_N`, `last_N` or a list, where the family can say it.
        expert_init: `copy`, `noise`, `drop`, `permute`, or a config node with `_target_`.
        dtype: of the result; None is the pool's, else the models'.
        seed: of every random draw.
        verify: `auto`, `layers`, `logits` or `none`; see `fusion_upcycle.merge_into_moe`.
        return_model: False skips loading a streamed result.
        overwrite: replace an earlier output of ours at `save_checkpoint`.
        max_shard_size: of the files.
        ignore_config_fields: unknown source config fields known to be without effect.

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
        shared: str = "average",
        base_expert: bool = False,
        experts_per_model: int = 1,
        calibration: Mapping[str, Any] | None = None,
        calibration_tokens: int = 4096,
        router_init: Any = "normal",
        target: str = AUTO,
        moe_layers: str | Sequence[int] = "all",
        expert_init: Any = "copy",
        dtype: str | None = None,
        seed: int = 0,
        verify: str = "auto",
        return_model: bool = True,
        overwrite: bool = False,
        max_shard_size: int | str = "5GB",
        ignore_config_fields: Sequence[str] = (),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if target not in self._targets:
            raise unknown(f"target of {type(self).__name__}:", str(target), self._targets)
        self._options = make_merging_options(
            experts_per_token=experts_per_token,
            shared=shared,
            base_expert=base_expert,
            experts_per_model=experts_per_model,
            calibration_tokens=calibration_tokens,
            router_init=initialiser(router_init),
            target=target,
            moe_layers=plain(moe_layers),
            expert_init=initialiser(expert_init),
            dtype=dtype,
            seed=seed,
            ignore_config_fields=plain(ignore_config_fields),
        )
        self._calibration: dict[str, Any] = plain(calibration) or {}
        resolve_mode(verify, streaming=False, total_bytes=0)
        self._writing = self._output_options(overwrite, max_shard_size)

    def run(
        self, modelpool: "BaseModelPool | Mapping[str, PreTrainedModel]"
    ) -> "PreTrainedModel | None":
        """Merge the models of a pool, or of a mapping name -> model.

        With `save_checkpoint`, and a pool that names folders or Hub ids, the merge streams from
        folders to folder, and the result is loaded only if `return_model`.

        Raises:
            UpcyclingError: see `fusion_upcycle.merge_into_moe`.
        """
        output = None if self.save_checkpoint is None else Path(self.save_checkpoint).expanduser()
        if output is not None:
            self._writing.check(output)
        if not isinstance(modelpool, BaseModelPool):
            return self._run_live(dict(modelpool), output, pool=None)
        names = [*([BASE] if modelpool.has_pretrained else []), *modelpool.model_names]
        found = {n: pooled_folder(modelpool, n, streaming=output is not None) for n in names}
        folders = {name: folder for name, folder in found.items() if folder is not None}
        if output is not None and len(folders) == len(found):
            require_own_tokenizer(modelpool, [folder.source for folder in folders.values()])
            return self._run_streaming(folders, output)
        local = {name: Path(folder.source).expanduser() for name, folder in folders.items()}
        check_same_tokenizer({name: path for name, path in local.items() if path.is_dir()})
        models = {name: modelpool.load_model(name) for name in found}
        return self._run_live(models, output, pool=modelpool)

    def _run_streaming(
        self, found: Mapping[str, PooledFolder], output: Path
    ) -> "PreTrainedModel | None":
        for folder in found.values():
            for name in read_config(locate(folder.source)).architectures or ():
                self._check_class(name)
        dtypes = {str(folder.dtype): folder.dtype for folder in found.values()}
        if len(dtypes) > 1 and self._options.dtype is None:
            raise UpcyclingError(
                f"The pool loads its models in different dtypes ({', '.join(sorted(dtypes))}). Set "
                "method.dtype."
            )
        dtype = next(iter(dtypes.values()))
        converted = merge_into_moe(
            {name: folder.source for name, folder in found.items()},
            output,
            calibration=self._calibration,
            verify=self.verify,
            overwrite=self._writing.overwrite,
            max_shard_size=self._writing.max_shard_size,
            **vars(self._options) | {"dtype": self._options.dtype or dtype},
        )
        return self._finish(converted)

    def _run_live(
        self,
        models: "Mapping[str, PreTrainedModel]",
        output: Path | None,
        pool: BaseModelPool | None,
    ) -> "PreTrainedModel":
        for model in models.values():
            self._check_class(type(model).__name__)
        merging, moe, proof, calibrated = merge_live(
            models,
            self._options,
            texts=named_documents(self._calibration),
            mode=self.verify,
            tokenizer_file=None if pool is None else tokenizer_file(pool),
        )
        sources = {
            name: {"name": type(model).__name__ + " in memory", "from_hub": False}
            for name, model in models.items()
        }
        about = describe_merging(merging) | {"sources": sources} | calibrated
        if output is None:
            self._report_live(merging.upcycling, proof, about)
            return moe
        converted = save_live(
            merging.upcycling,
            proof,
            output,
            source=next(iter(sources.values())),
            companions=partial(save_companions, moe, pool),
            options=self._writing,
            about=about,
        )
        self._report(converted)
        return moe


class MixtralForCausalLMMergingAlgorithm(MoEMergingAlgorithm):
    """Llama or Mistral causal LMs to one `MixtralForCausalLM`; options as in its base."""

    _accepted = ("LlamaForCausalLM", "MistralForCausalLM")
    _targets = (AUTO, "mixtral")


class MixtralMoEMergingAlgorithm(MoEMergingAlgorithm):
    """Backbones, `LlamaModel` or `MistralModel`, to one `MixtralModel`; options as in its base."""

    _accepted = ("LlamaModel", "MistralModel")
    _targets = (AUTO, "mixtral")
