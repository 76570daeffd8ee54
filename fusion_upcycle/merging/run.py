"""MoE merging from folders to a folder and from models to a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.source import check_companions
from fusion_upcycle.checkpoint.tensors import StateDictSource
from fusion_upcycle.conversion.adapted import adapted_tensors, open_model
from fusion_upcycle.conversion.live import live_config
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.run import open_folders, to_folder
from fusion_upcycle.errors import plain_logger, setting, spelled_except
from fusion_upcycle.merging.calibration import route
from fusion_upcycle.merging.companions import Companions, agree_on_companions, live_notes
from fusion_upcycle.merging.merging import BASE, DenseModel, Merging
from fusion_upcycle.merging.options import MergingOptions, make_merging_options
from fusion_upcycle.merging.plan import expert_models, plan_merging
from fusion_upcycle.merging.tokenizers import compare_tokenizers
from fusion_upcycle.texts.documents import named_documents

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = plain_logger(__name__)
Planned = TypeVar("Planned", bound=Merging)


@contextmanager
def base_among_models() -> Iterator[None]:
    """Within the block, errors say how the base is given to a merge: as one of its models."""
    places = {
        "base=": f'"{BASE}": "FOLDER" among the models',
        "method.base=": f"modelpool.models.{BASE}=FOLDER",
    }
    here = setting("base", "FOLDER")  # as it is on the command line, and where it was said before
    with spelled_except(base=next((places[p] for p in places if here.startswith(p)), here)):
        yield


@base_among_models()
def merge_into_moe(
    models: Mapping[str, str | Path],
    output: str | Path,
    *,
    calibration: Mapping[str, Any] | None = None,
    verify: str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    push_to_hub: str | None = None,
    **options: Any,
) -> Converted:
    """Merge dense models of one shape into a Mixture-of-Experts folder.

    Each model's FFNs become experts, all else is the mean over the models (Branch-Train-MiX,
    arXiv 2403.07816), or the base model's.

    Args:
        models: name -> local folder or Hugging Face Hub id (safetensors), of a model or a LoRA
            adapter (PEFT). The name `_pretrained_` is that of the base model, which gives experts
            only if `base_expert`, and which adapters are put on; without it, each is put on the
            one that its `adapter_config.json` names.
        output: folder to make. It appears only when complete and proven.
        calibration: for `router_init=prototype`: name of each model that gives experts -> its
            texts, as `fusion_upcycle.texts.documents` takes them.
        verify: `layers` streams; `logits` loads the result and takes the outputs from there;
            `none` leaves it unproven; `auto` is `layers`.
        overwrite: replace an earlier output of ours.
        max_shard_size: of the files, as in "5GB".
        progress: show progress bars.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload the finished folder to; made
            private if it is not there. Name and token are checked before any work.
        options: fields of `MergingOptions`: shared, base_expert, experts_per_model,
            experts_per_token, router_init, dtype, seed, ...

    Returns:
        What was made and proven.

    Raises:
        UpcyclingError: models, an option or an output that cannot be used, by name.
        ProofError: the result is not what it claims to be; nothing is left behind.
    """
    chosen = make_merging_options(**options)
    expert_models(models, chosen)  # before any is fetched
    folders = open_folders(
        models,
        output,
        main=BASE if BASE in models else None,
        bases=dict.fromkeys(models.keys() - {BASE}, models[BASE]) if BASE in models else {},
        verify=verify,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress,
        push_to_hub=push_to_hub,
    )
    models_of = {name: opened(folders.at(name), chosen.part) for name in folders.local}
    merging = plan_merging(models_of, chosen)
    folders = replace(folders, main=merging.main)
    check_companions(folders.source)
    configs = {name: model.config for name, model in merging.models.items()}
    companions = agree_on_files(folders.local, configs, merging.main)
    merging = say(merging, companions.notes)
    folders.check_tokenizer(merging.config)
    texts = named_documents(calibration)
    merging = route(merging, texts, folders.tokenizer_file, progress=progress)
    return to_folder(merging, folders, put=merging.put_beside, put_last=companions.put)


def opened(at: Located, part: str = "whole") -> DenseModel:
    """One of the models of a merge; `part` as in `open_model`."""
    config, source = open_model(at, part)
    return DenseModel(config, source, getattr(source, "trained", None))


def plan_models(
    models: "Mapping[str, PreTrainedModel]",
    options: MergingOptions,
    *,
    texts: Mapping[str, Sequence[str]],
    tokenizer_file: Path | None = None,
    notes: Sequence[str] | None = None,
    progress: bool = False,
) -> Merging:
    """Plan the merge of live models, for `fusion_upcycle.conversion.run.to_model`.

    Args:
        models: name -> model.
        texts: for `router_init=prototype`, model -> documents.
        tokenizer_file: `tokenizer.json` for these.
        notes: what the models' files have been found to differ in; None if nobody looked.
        progress: show a bar while the models run on their texts.

    Raises:
        UpcyclingError: models, texts or options that do not fit.
    """
    dense = {
        name: DenseModel(
            live_config(model), StateDictSource(model.state_dict()), adapted_tensors(model)
        )
        for name, model in models.items()
    }
    merging = plan_merging(dense, options)
    notes = live_notes(models, merging.main) if notes is None else notes
    return route(say(merging, notes), texts, tokenizer_file, progress=progress)


def agree_on_files(
    folders: Mapping[str, Path], configs: "Mapping[str, PreTrainedConfig]", main: str
) -> Companions:
    """Compare the tokenizers of all models, and decide whose templates and the like are carried.

    Args:
        folders: model -> its folder.
        configs: model -> its config.
        main: the model whose files the result has.

    Returns:
        What the result's folder gets beside these, and what is to be said.

    Raises:
        UpcyclingError: another tokenizer, naming the model, the file and what differs.
    """
    reads = compare_tokenizers(folders, main)
    found = agree_on_companions(folders, configs, main, reads.dropped)
    return replace(found, notes=[*reads.in_words(main), *found.notes])


def say(merging: Planned, notes: Sequence[str]) -> Planned:
    """The merge, whose record says these too; and all of it on the screen."""
    merging = replace(merging, notes=notes)
    for line in merging.said:
        log.warning("The models differ: %s.", line)
    return merging
