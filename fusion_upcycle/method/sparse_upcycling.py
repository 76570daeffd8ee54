"""Sparse upcycling: any supported family, and Mixtral under FusionBench's own class names."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseModelPool
from fusion_bench.mixins import auto_register_config

from fusion_upcycle.checkpoint.located import locate_model
from fusion_upcycle.checkpoint.staging import RECORD_FILE
from fusion_upcycle.checks import AUTO
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.run import identity_of_source, to_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.method.arguments import sort_arguments, takes_options
from fusion_upcycle.method.conversion import ConversionAlgorithm, InMemory
from fusion_upcycle.method.pool import PooledFolder, pooled_folder
from fusion_upcycle.untrusted import read_object
from fusion_upcycle.upcycling.options import UpcyclingOptions, make_options
from fusion_upcycle.upcycling.run import plan_model, upcycle
from fusion_upcycle.verification.proof import resolve_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@auto_register_config
@takes_options(UpcyclingOptions)
class SparseUpcyclingAlgorithm(ConversionAlgorithm):
    """Sparse upcycling of a dense model, causal LM or backbone, to a Mixture-of-Experts model.

    Args:
        num_experts, experts_per_token: as the others, see `options`.
        save_checkpoint: folder to write; None keeps the result in memory only.
        base: where `_pretrained_` is a LoRA adapter, folder or Hub id of the model that it is put
            on; None is the one that it names itself.
        verify: `auto`, `layers`, `logits` or `none`; see `fusion_upcycle.upcycle`.
        return_model: False skips loading a streamed result.
        overwrite: replace an earlier output of ours at `save_checkpoint`.
        max_shard_size: of the files.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload `save_checkpoint` to.
        options: those of `fusion_upcycle.UpcyclingOptions`; initialisers may also be config nodes
            with `_target_`, and `dtype` is that of the pool before it is the source's.

    Raises:
        UpcyclingError: an option that cannot be used; `run` raises it for the model.
    """

    _elsewhere = (
        "Backbones go into MixtralUpscalingAlgorithm, causal language models into "
        "MixtralForCausalLMUpscalingAlgorithm."
    )

    base: str | None

    def __init__(
        self,
        num_experts: int,
        experts_per_token: int,
        save_checkpoint: str | None = None,
        *,
        base: str | None = None,
        verify: str = "auto",
        return_model: bool = True,
        overwrite: bool = False,
        max_shard_size: int | str = "5GB",
        push_to_hub: str | None = None,
        **options: Any,
    ):
        keys, given = sort_arguments(self, options)
        super().__init__(**keys)
        self._options = make_options(
            num_experts=num_experts, experts_per_token=experts_per_token, **given
        )
        if not isinstance(base, str | None):
            raise UpcyclingError(f"base={base!r} must be a folder or Hub id.")
        self._check_target(self._options.target)
        resolve_mode(verify, streaming=False)
        self._writing = self._output_options(overwrite, max_shard_size, push_to_hub)

    def _bases(self, folders: Mapping[str, PooledFolder]) -> Mapping[str, str]:
        return {} if self.base is None else dict.fromkeys(folders, self.base)

    def _stream(self, folders: Mapping[str, PooledFolder], output: Path) -> Converted:
        (found,) = folders.values()
        return upcycle(
            found.source,
            output,
            base=self.base,
            **self._how,
            **self._options_for(found),
        )

    def _options_for(self, found: PooledFolder) -> dict[str, Any]:
        """The options, with the dtype that the pool asks for where they name none."""
        return vars(self._options) | {"dtype": self._options.dtype or found.dtype}

    def has_made(self, modelpool: BaseModelPool, output: Path) -> bool:
        """Whether a folder is what streaming this pool's model to it would write."""
        found = pooled_folder(modelpool)
        if found is None or not (output / RECORD_FILE).is_file():
            return False
        record = read_object(output / RECORD_FILE)
        options = make_options(**self._options_for(found))
        source = identity_of_source(found.source, locate_model(found.source, self.base), self.base)
        return record.get("source") == source and record.get("options") == options.to_json()

    def _convert(
        self, models: "Mapping[str, PreTrainedModel]", tokenizer_file: Path | None
    ) -> InMemory:
        (dense,) = models.values()
        upcycling = plan_model(dense, self._options)
        moe, proof = to_model(
            upcycling,
            dense,
            verify=self.verify,
            tokenizer_file=tokenizer_file,
            progress=self._writing.progress,
        )
        return InMemory(moe, upcycling, proof)


class MixtralForCausalLMUpscalingAlgorithm(SparseUpcyclingAlgorithm):
    """A dense causal LM, Llama or Mistral, to `MixtralForCausalLM`; options as in its base."""

    _accepted = ("LlamaForCausalLM", "MistralForCausalLM")
    _targets = (AUTO, "mixtral")


class MixtralUpscalingAlgorithm(SparseUpcyclingAlgorithm):
    """A backbone, `LlamaModel` or `MistralModel`, to `MixtralModel`; options as in its base."""

    _accepted = ("LlamaModel", "MistralModel")
    _targets = (AUTO, "mixtral")
