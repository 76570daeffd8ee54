"""MoE merging: the FFNs of several models of one shape become the experts, all else one mean.

Branch-Train-MiX (arXiv 2403.07816), planned as a duplication plan with several source experts:
everything after the plan is what sparse upcycling does.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fusion_upcycle.architectures.layout import empty_model, tied_names
from fusion_upcycle.checkpoint.view import TURNED, RenamedSource
from fusion_upcycle.checks import dtype_name
from fusion_upcycle.conversion.completeness import held_twice
from fusion_upcycle.errors import UpcyclingError, plain_logger, setting
from fusion_upcycle.experts import DuplicationPlan
from fusion_upcycle.merging.agreement import agree, vocabulary_of
from fusion_upcycle.merging.merging import BASE, DenseModel, Merging
from fusion_upcycle.merging.options import MergingOptions
from fusion_upcycle.merging.source import MergeSource, own_name
from fusion_upcycle.upcycling.frame import Frame, plan_frame, source_dtype
from fusion_upcycle.upcycling.plan import plan_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = plain_logger(__name__)


Made = TypeVar("Made", bound=Merging)


def expert_models(models: Iterable[str], options: MergingOptions) -> list[str]:
    """Names of the models that give experts.

    Raises:
        UpcyclingError: fewer than two, or a missing base.
    """
    names = list(models)
    experts = [name for name in names if name != BASE or options.base_expert]
    if BASE not in names and (options.base_expert or options.shared == "base"):
        raise UpcyclingError(
            f"shared={options.shared}, base_expert={str(options.base_expert).lower()} need the "
            f"base model, and there is none; the models are {names}. Name it {BASE}."
        )
    if len(experts) < 2:
        raise UpcyclingError(
            f"Merging needs two or more models that give experts, and there are {experts}. Give "
            f"more, or pass {setting('base_expert', True)} to take {BASE} as one."
        )
    return experts


def main_model(configs: "Mapping[str, PreTrainedConfig]", options: MergingOptions) -> str:
    """The model whose config, vocabulary, tokenizer and other files the result has."""
    first = BASE if BASE in configs else next(iter(configs))
    if options.vocabulary == "base":
        return first
    rows = {name: vocabulary_of(config) for name, config in configs.items()}
    return max([first, *configs], key=lambda name: rows[name])


def plan_merging(models: Mapping[str, DenseModel], options: MergingOptions) -> Merging:
    """Decide every tensor of the merged MoE; refuse, by name, models that do not fit together.

    Args:
        models: name -> model; `BASE` is the one that the others were trained from, if it is there.
        options: what to make of them.

    Raises:
        UpcyclingError: fewer than two experts, a missing base, or models that differ in what their
            forward pass needs, a tensor or a shape; and whatever sparse upcycling refuses.
    """
    experts = expert_models(models, options)
    models = _with_classes(models)
    configs = {name: model.config for name, model in models.items()}
    main = main_model(configs, options)
    agreement = agree(configs, main, options.ignore_config_fields)
    source_config = _with_stop_tokens(configs, main)
    if options.dtype is None:
        _check_dtypes(models)
    frame = plan_frame(models[main].source, source_config, options.for_models(len(experts)))
    kept = _kept_names(frame)
    adapters = {name: trained for name in experts if (trained := models[name].trained) is not None}
    models = _alike(models, frame)
    shared = [BASE] if options.shared == "base" else experts
    make = partial(Merging, models=models, agreement=agreement)
    merging = merged_tensors(frame, models, experts, shared, options, make, main=main)
    _tell_adapters(adapters, kept, options)
    return merging


def merged_tensors(
    frame: Frame,
    models: Mapping[str, DenseModel],
    experts: Sequence[str],
    shared: Sequence[str],
    options: MergingOptions,
    make: Callable[..., Made],
    *,
    main: str,
) -> Made:
    """Decide every tensor of a merge, of models that are known to fit together.

    Args:
        models: with their tensors under the names that the family goes by.
        experts: those that give experts, in their order.
        shared: those whose mean all else is.
        make: of the fields of a `Merging` but its models.
        main: the model whose config and vocabulary the result has.
    """
    merged = MergeSource(
        {name: model.source for name, model in models.items()},
        main=main,
        vocabularies={name: vocabulary_of(model.config) for name, model in models.items()},
        kept=_kept_names(frame),
        experts=experts,
        shared=shared,
        dtypes={name: spec.dtype for name, spec in frame.layout.specs.items()},
        dtype=frame.dtype,
    )
    order = tuple(i for i in range(len(experts)) for _ in range(options.experts_per_model))
    plan = DuplicationPlan(dict.fromkeys(frame.resolved.moe_layers, order))
    return plan_tensors(
        frame,
        merged,
        plan,
        lambda name: [own_name(model, name) for model in experts],
        partial(
            make,
            averaged=merged.averaged,
            merged=merged,
            main=main,
            experts=experts,
            asked=options,
        ),
    )


def _with_classes(models: Mapping[str, DenseModel]) -> dict[str, DenseModel]:
    """The models, those whose config does not say a class with that of the first that does."""
    said = next((m.config.architectures for m in models.values() if m.config.architectures), None)
    found = {}
    for name, model in models.items():
        config = model.config
        if not config.architectures and said is not None:
            config = copy.deepcopy(config)
            config.architectures = said
        found[name] = replace(model, config=config)
    return found


def _with_stop_tokens(configs: "Mapping[str, PreTrainedConfig]", main: str) -> "PreTrainedConfig":
    """Main's config; where it says no stop token, with those that all others agree on."""
    found = [ids for c in configs.values() if (ids := getattr(c, "eos_token_id", None)) is not None]
    config = configs[main]
    if getattr(config, "eos_token_id", None) is not None or not found:
        return config
    numbers = found[0] if isinstance(found[0], list) else [found[0]]
    if any(ids != found[0] for ids in found) or max(numbers) >= vocabulary_of(config):
        return config
    config = copy.deepcopy(config)
    config.eos_token_id = found[0]
    return config


def _alike(models: Mapping[str, DenseModel], frame: Frame) -> dict[str, DenseModel]:
    """The models' tensors under the family's names, without what only some have and none needs."""
    family = frame.architecture
    seen = {name: family.view(model.source, model.config) for name, model in models.items()}
    in_all = set.intersection(*({*source.specs} for source in seen.values()))
    found = {}
    for name, source in seen.items():
        extra = source.specs.keys() - in_all
        left_out = {tensor for tensor in extra if tensor.endswith(frame.dense.derived)}
        if extra:  # second names of tied tensors
            tied = tied_names(empty_model(frame.source_config))
            left_out |= held_twice(source, tied)[0] & extra
        names = {tensor: tensor for tensor in source.specs if tensor not in left_out}
        source = RenamedSource(source, names) if left_out else source
        found[name] = replace(models[name], source=source)
    return found


def _kept_names(frame: Frame) -> list[str]:
    """Names, in the files, of the FFNs of all MoE layers; fused tensors where files have them."""
    endings = {name.removesuffix(TURNED) for name in frame.dense.ffn.values()}
    if frame.dense.splits is not None:
        for fused, parts in frame.dense.splits(frame.source_config).items():
            if endings & (split := {part for part, _ in parts}):
                endings = endings - split | {fused}
    prefix = frame.architecture.live_prefix
    layers = [prefix(frame.source_config, layer) for layer in frame.resolved.moe_layers]
    return [layer + ending for layer in layers for ending in endings]


def _tell_adapters(
    adapters: Mapping[str, Collection[str]], kept: Collection[str], options: MergingOptions
) -> None:
    """Say of which adapters something is not in the result."""
    for name, trained in adapters.items():
        inside = set(trained) & set(kept)
        elsewhere = sorted({tensor.split(".")[-2] for tensor in set(trained) - inside})
        if not inside:
            log.warning(
                "The adapter %s trains nothing in the FFNs of the MoE layers (only %s): its "
                "experts are its base's own.",
                name,
                ", ".join(elsewhere) or "nothing",
            )
        if elsewhere and options.shared == "base":
            log.warning(
                "What the adapter %s trains outside of the FFNs (%s) is not in the result, as "
                "shared=base; with shared=average, its share of the mean is.",
                name,
                ", ".join(elsewhere),
            )


def _check_dtypes(models: Mapping[str, DenseModel]) -> None:
    dtypes: dict[str, list[str]] = {}
    for name, model in models.items():
        dtype = dtype_name(source_dtype(model.source, model.config))
        dtypes.setdefault(dtype, []).append(name)
    if len(dtypes) > 1:
        raise UpcyclingError(
            "The models have different dtypes ("
            + "; ".join(f"{dtype}: {', '.join(names)}" for dtype, names in dtypes.items())
            + f"). Choose that of the result, as in {setting('dtype', 'bfloat16')}."
        )
