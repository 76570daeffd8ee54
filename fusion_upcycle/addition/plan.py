"""Planning an added expert: the merge of all, with the old ones read from the merged model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fusion_upcycle.addition.addition import Addition
from fusion_upcycle.addition.within import DenseWithin, WithFFNs
from fusion_upcycle.architectures.layout import file_layout
from fusion_upcycle.architectures.weightless import WeightlessSource
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.merging.merging import BASE, DenseModel, Merging
from fusion_upcycle.merging.options import MergingOptions
from fusion_upcycle.merging.plan import merged_tensors, plan_merging
from fusion_upcycle.upcycling.frame import plan_frame
from fusion_upcycle.verification.names import differences, meaning

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def plan_addition(
    moe: TensorSource,
    moe_config: "PreTrainedConfig",
    dense_config: "PreTrainedConfig",
    experts: Sequence[str],
    added: str,
    new: DenseModel,
    options: MergingOptions,
) -> Addition:
    """Decide every tensor of the larger MoE; refuse, by name, a model that does not fit.

    Args:
        moe: the merged model's tensors.
        moe_config: its config.
        dense_config: of the dense models within it, with `architectures` set.
        experts: names of the models that it was merged from, in the order of its experts.
        added: name of the new one.
        new: it.
        options: of the merge; `dtype` is that of the model.

    Raises:
        UpcyclingError: a merged model that is not what its record says, or a new one that a merge
            would refuse.
    """
    like = DenseModel(dense_config, _without_data(dense_config, moe))
    before = _as_merged(like, experts, options)
    _check_model(moe, moe_config, before)
    checked = _checked(like, added, new, options)
    within = {name: DenseWithin(moe, before, name) for name in experts}
    rest = within[experts[0]]
    kept = [name for name in rest.specs if before.merged.keeps(name)]
    own = WithFFNs(rest, checked.models[added].source, kept)
    frame = plan_frame(rest, dense_config, options.for_models(len(experts) + 1))
    models = {name: DenseModel(dense_config, source) for name, source in within.items()}
    return merged_tensors(
        frame,
        models | {added: DenseModel(dense_config, own)},
        [*experts, added],
        [experts[0]],  # the model's own, whichever expert stands in the dense one
        options,
        partial(
            Addition,
            moe=moe,
            moe_config=moe_config,
            added=added,
            models={added: checked.models[added]},
            agreement=replace(checked.agreement, main="the merged model"),
        ),
        main=experts[0],
    )


def _without_data(config: "PreTrainedConfig", moe: TensorSource) -> WeightlessSource:
    """Tensors of a dense model within this one; a T5 may have a head of its own, tied or not."""
    source = WeightlessSource(config)
    for name, twin in file_layout(config).tied.items():
        source.specs.pop(name, None)
        if name in moe.specs:
            source.specs[name] = source.specs[twin]
    return source


def _as_merged(like: DenseModel, experts: Sequence[str], options: MergingOptions) -> Merging:
    """The merge that made the model, of models without data."""
    return plan_merging(
        dict.fromkeys(experts if BASE in experts else [BASE, *experts], like),
        replace(options, shared="base", vocabulary="base", base_expert=BASE in experts),
    )


def _check_model(moe: TensorSource, config: "PreTrainedConfig", merging: Merging) -> None:
    found, planned = meaning(config), meaning(merging.config)
    if found != planned:
        raise UpcyclingError(
            "The model's config.json is not what it was made with: "
            f"{differences(found, planned)}. Put that back, or merge again."
        )
    shapes = {name: spec.shape for name, spec in merging.specs.items()}
    if wrong := [
        name
        for name in sorted(shapes.keys() | moe.specs.keys())
        if name not in moe.specs or moe.specs[name].shape != shapes.get(name)
    ]:
        raise UpcyclingError(
            f"The model's tensors are not those that it was made with: {', '.join(wrong[:3])} "
            "is missing, left over or of another shape. Merge again."
        )


def _checked(like: DenseModel, added: str, new: DenseModel, options: MergingOptions) -> Merging:
    """The merge of the new model alone with its like: what stands in its way is said as there."""
    return plan_merging(
        {BASE: like, added: new},
        replace(options, shared="base", vocabulary="base", base_expert=True),
    )
