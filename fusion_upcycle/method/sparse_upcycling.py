"""Sparse upcycling: any supported family, and Mixtral under FusionBench's own class names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench.mixins import auto_register_config

from fusion_upcycle.checks import AUTO
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import unknown
from fusion_upcycle.method.conversion import ConversionAlgorithm, InMemory, initialiser
from fusion_upcycle.method.pool import PooledFolder, plain
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_model, upcycle
from fusion_upcycle.verification.proof import resolve_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@auto_register_config
class SparseUpcyclingAlgorithm(ConversionAlgorithm):
    """Sparse upcycling of a dense model, causal LM or backbone, to a Mixture-of-Experts model.

    Args:
        num_experts: experts per layer, N >= 2.
        experts_per_token: top-k.
        save_checkpoint: folder to write; None keeps the result in memory only.
        target: MoE family, or `auto` to go by the source.
        granularity, expert_intermediate_size: fine-grained experts; these and the next
            three are explained in `fusion_upcycle.UpcyclingOptions`.
        moe_layers: `all`, `every_N`, `last_N` or a list, where the family can say it.
        normalize_topk_prob: whether top-k weights are divided by their sum.
        shared_expert: `auto`, `copy`, `zero` or `none`, for families that have one.
        shared_expert_intermediate_size: its width; None is the dense FFN's.
        expert_init: `copy`, `noise`, `drop`, `permute`, `subset`, `qwen2`, or a config node with
            `_target_`.
        router_init: `normal` or `zeros`, likewise.
        dtype: of the result; None is the pool's, else the source's.
        seed: of every random draw.
        verify: `auto`, `layers`, `logits` or `none`; see `fusion_upcycle.upcycle`.
        return_model: False skips loading a streamed result.
        overwrite: replace an earlier output of ours at `save_checkpoint`.
        max_shard_size: of the files.
        ignore_config_fields: unknown source config fields known to be without effect.

    Raises:
        UpcyclingError: an option that cannot be used; `run` raises it for the model.
    """

    _elsewhere = (
        "Backbones go into MixtralUpscalingAlgorithm, causal language models into "
        "MixtralForCausalLMUpscalingAlgorithm."
    )

    def __init__(
        self,
        num_experts: int,
        experts_per_token: int,
        save_checkpoint: str | None = None,
        *,
        target: str = "auto",
        granularity: int = 1,
        expert_intermediate_size: int | None = None,
        moe_layers: str | Sequence[int] = "all",
        normalize_topk_prob: bool = True,
        shared_expert: str = "auto",
        shared_expert_intermediate_size: int | None = None,
        expert_init: Any = "copy",
        router_init: Any = "normal",
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
        self._options = make_options(
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            target=target,
            granularity=granularity,
            expert_intermediate_size=expert_intermediate_size,
            moe_layers=plain(moe_layers),
            normalize_topk_prob=normalize_topk_prob,
            shared_expert=shared_expert,
            shared_expert_intermediate_size=shared_expert_intermediate_size,
            expert_init=initialiser(expert_init),
            router_init=initialiser(router_init),
            dtype=dtype,
            seed=seed,
            ignore_config_fields=plain(ignore_config_fields),
        )
        resolve_mode(verify, streaming=False, total_bytes=0)
        self._writing = self._output_options(overwrite, max_shard_size)

    def _stream(self, folders: Mapping[str, PooledFolder], output: Path) -> Converted:
        (found,) = folders.values()
        return upcycle(
            found.source,
            output,
            verify=self.verify,
            overwrite=self._writing.overwrite,
            max_shard_size=self._writing.max_shard_size,
            **vars(self._options) | {"dtype": self._options.dtype or found.dtype},
        )

    def _convert(
        self, models: "Mapping[str, PreTrainedModel]", tokenizer_file: Path | None
    ) -> InMemory:
        (dense,) = models.values()
        upcycling = plan_model(dense, self._options)
        moe, proof = to_model(upcycling, dense, verify=self.verify, tokenizer_file=tokenizer_file)
        return InMemory(moe, upcycling, proof)


class MixtralForCausalLMUpscalingAlgorithm(SparseUpcyclingAlgorithm):
    """A dense causal LM, Llama or Mistral, to `MixtralForCausalLM`; options as in its base."""

    _accepted = ("LlamaForCausalLM", "MistralForCausalLM")
    _targets = (AUTO, "mixtral")


class MixtralUpscalingAlgorithm(SparseUpcyclingAlgorithm):
    """A backbone, `LlamaModel` or `MistralModel`, to `MixtralModel`; options as in its base."""

    _accepted = ("LlamaModel", "MistralModel")
    _targets = (AUTO, "mixtral")
