"""MoE merging from folders to a folder and from models to a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.tensors import StateDictSource
from fusion_upcycle.conversion.adapted import adapted_tensors, open_model
from fusion_upcycle.conversion.live import live_config
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.run import open_folders, to_folder
from fusion_upcycle.errors import UpcyclingError, setting, spelled_except
from fusion_upcycle.merging.calibration import route
from fusion_upcycle.merging.merging import BASE, DenseModel, Merging
from fusion_upcycle.merging.options import MergingOptions, make_merging_options
from fusion_upcycle.merging.plan import expert_models, plan_merging
from fusion_upcycle.texts.documents import named_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What of a `tokenizer.json` decides which ids a text becomes; the rest is the last call's state.
_TOKENIZER_FIELDS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")


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
    check_same_tokenizer(folders.local)
    folders.check_tokenizer(merging.config)
    texts = named_documents(calibration)
    merging = route(merging, texts, folders.tokenizer_file, progress=progress)
    return to_folder(merging, folders, put=merging.put_beside)


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
    progress: bool = False,
) -> Merging:
    """Plan the merge of live models, for `fusion_upcycle.conversion.run.to_model`.

    Args:
        models: name -> model.
        texts: for `router_init=prototype`, model -> documents.
        tokenizer_file: `tokenizer.json` for these.
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
    return route(plan_merging(dense, options), texts, tokenizer_file, progress=progress)


def check_same_tokenizer(folders: Mapping[str, Path]) -> None:
    """Refuse models whose `tokenizer.json`, where they have one, gives other token ids.

    Raises:
        UpcyclingError: names the model and what differs.
    """
    found = {
        name: json.loads(path.read_bytes())
        for name, folder in folders.items()
        if (path := folder / "tokenizer.json").is_file()
    }
    if not found:
        return
    if lacking := folders.keys() - found.keys():
        raise UpcyclingError(
            f"Models {sorted(lacking)} have no tokenizer.json, others have ({', '.join(found)}). "
            "Put it there if the tokenizer is the same: only such models can be merged."
        )
    (first, reference), *others = found.items()
    for name, tokenizer in others:
        for field in _TOKENIZER_FIELDS:
            if tokenizer.get(field) != reference.get(field):
                raise UpcyclingError(
                    f"Model {name} has another tokenizer than model {first}: {field} differs "
                    "(tokenizer.json). Only models of one tokenizer can be merged."
                )
