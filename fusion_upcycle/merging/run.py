"""MoE merging from folders to a folder, streaming: no model is ever in memory."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import (
    check_companions,
    copy_companions,
    locate,
    read_config,
)
from fusion_upcycle.conversion.run import Converted, OutputOptions, write_output
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.merging.calibration import route
from fusion_upcycle.merging.options import make_merging_options
from fusion_upcycle.merging.plan import BASE, DenseModel, Merging, plan_merging
from fusion_upcycle.merging.proof import prove_merging
from fusion_upcycle.texts.documents import named_documents
from fusion_upcycle.upcycling.run import describe_source, load_model, open_result
from fusion_upcycle.verification import Proof, resolve_mode, sample_tokens

#: What of a `tokenizer.json` decides which ids a text becomes; the rest is the last call's state.
_TOKENIZER_FIELDS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")


def merge_into_moe(
    models: Mapping[str, str | Path],
    output: str | Path,
    *,
    calibration: Mapping[str, Any] | None = None,
    verify: str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    **options: Any,
) -> Converted:
    """Merge dense models of one shape into a Mixture-of-Experts folder.

    Each model's FFNs become experts, all else is the mean over the models (Branch-Train-MiX,
    arXiv 2403.07816), or the base model's.

    Args:
        models: name -> local folder or Hugging Face Hub id (safetensors). The name `_pretrained_`
            is that of the base model, which gives experts only if `base_expert`.
        output: folder to make. It appears only when complete and proven.
        calibration: for `router_init=prototype`: name of each model that gives experts -> its
            texts, as `fusion_upcycle.texts.documents` takes them.
        verify: `layers` streams; `logits` loads the result and takes the outputs from there;
            `none` leaves it unproven; `auto` is `logits` below 2 GiB, else `layers`.
        overwrite: replace an earlier output of ours.
        max_shard_size: of the files, as in "5GB".
        progress: show progress bars.
        options: fields of `MergingOptions`: shared, base_expert, experts_per_model,
            experts_per_token, router_init, dtype, seed, ...

    Returns:
        What was made and proven.

    Raises:
        UpcyclingError: models, an option or an output that cannot be used, by name.
        ProofError: the result is not what it claims to be; nothing is left behind.
    """
    chosen = make_merging_options(**options)
    resolve_mode(verify, streaming=True, total_bytes=0)
    output = Path(output).expanduser().resolve()
    folders = {name: locate(model) for name, model in models.items()}
    writing = OutputOptions(overwrite, max_shard_size, progress)
    for name, folder in folders.items():
        if folder.resolve().is_relative_to(output):
            raise UpcyclingError(
                f"{output} is model {name} itself, or holds it ({folder}). Choose another output."
            )
    writing.check(output)
    merging = plan_merging(
        {name: DenseModel(read_config(f), CheckpointReader(f)) for name, f in folders.items()},
        chosen,
    )
    check_same_tokenizer(folders)
    companions = folders.get(BASE) or next(iter(folders.values()))
    check_companions(companions)
    tokenizer_file = companions / "tokenizer.json"
    tokens = sample_tokens(tokenizer_file, merging.upcycling.config)
    texts = named_documents(calibration)
    merging, calibrated = route(merging, texts, tokenizer_file, progress=progress)
    mode = resolve_mode(verify, streaming=True, total_bytes=merging.upcycling.total_bytes)

    def prove_staged(staging: Path) -> Proof:
        upcycling = merging.upcycling
        return prove_merging(
            merging,
            open_result(upcycling, staging),
            mode=mode,
            tokens=tokens,
            moe=lambda: load_model(
                staging, upcycling.config, upcycling.dtype, progress=progress, complete=True
            ),
            progress=progress,
        )

    sources = {name: describe_source(models[name], folder) for name, folder in folders.items()}
    return write_output(
        merging.upcycling,
        output,
        source=sources[BASE if BASE in sources else next(iter(sources))],
        companions=partial(copy_companions, companions),
        prove=prove_staged,
        options=writing,
        about=describe_merging(merging) | {"sources": sources} | calibrated,
    )


def describe_merging(merging: Merging) -> dict[str, Any]:
    """What the record of a merge says beside and instead of that of an upcycling."""
    copies = merging.options.experts_per_model
    return {
        "method": "MoE merging",
        "options": merging.options.to_json(len(merging.experts)),
        "experts": {
            model: list(range(first := merging.first_expert(model), first + copies))
            for model in merging.experts
        },
    }


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
