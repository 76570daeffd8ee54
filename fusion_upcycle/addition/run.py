"""One more expert for a merged model, from folder to folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusion_upcycle.addition.addition import MODEL, Addition
from fusion_upcycle.addition.plan import plan_addition
from fusion_upcycle.checkpoint.located import Located, locate_model
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checkpoint.staging import RECORD_FILE
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.run import open_folders, to_folder
from fusion_upcycle.errors import ProofError, UpcyclingError, setting
from fusion_upcycle.merging.calibration import route
from fusion_upcycle.merging.merging import Merging
from fusion_upcycle.merging.options import MergingOptions, make_merging_options
from fusion_upcycle.merging.prototypes import Moments
from fusion_upcycle.merging.run import agree_on_files, opened, say
from fusion_upcycle.merging.statistics import STATISTICS_FOLDER, read_statistics
from fusion_upcycle.texts.documents import load_documents
from fusion_upcycle.untrusted import read_json
from fusion_upcycle.upcycling.run import check_base

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Largest difference of a router from what its statistics give, relative to its largest value:
#: another machine may solve the same equations with other rounding.
_ROUNDING = 1e-3


def add_expert(
    model: str | Path,
    fine_tune: str | Path,
    output: str | Path,
    *,
    data: Any,
    name: str | None = None,
    base: str | Path | None = None,
    verify: str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    push_to_hub: str | None = None,
) -> Converted:
    """Add one expert to a model that was merged with `statistics=true`.

    Only the new model runs, on its own texts; what the routers saw of the others, `model` keeps.
    With `shared=base` the result is the merge of all models at once with the same texts, bit for
    bit on the same machine and with the same number of threads; with `shared=average` all that is
    shared stays the mean over the models that were merged first. The result keeps statistics again.

    Args:
        model: folder of the merged model.
        fine_tune: local folder or Hugging Face Hub id of the new model (safetensors), or of a LoRA
            adapter.
        output: folder to make. It appears only when complete and proven.
        data: texts of the new model, as `fusion_upcycle.texts.documents` takes them.
        name: of the new model; by default that of its folder.
        base: of an adapter, the model that it is put on; by default the one that its file names.
        verify: as `merge_into_moe` takes it.
        overwrite: replace an earlier output of ours.
        max_shard_size: of the files, as in "5GB".
        progress: show progress bars.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload the finished folder to; made
            private if it is not there. Name and token are checked before any work.

    Returns:
        What was made and proven.

    Raises:
        UpcyclingError: a model that is no merge of ours with statistics, or that has changed since;
            a new one that a merge would refuse; texts or an output that cannot be used.
        ProofError: the result is not what it claims to be; nothing is left behind.
    """
    merged = read_merged(Path(model).expanduser())
    added = merged.new_name(fine_tune, name)
    folders = open_folders(
        {MODEL: model, added: fine_tune},
        output,
        main=MODEL,
        bases={} if base is None else {added: base},
        verify=verify,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress,
        push_to_hub=push_to_hub,
    )
    check_base(folders.at(added), base)
    addition = merged.plan(added, folders.at(added))
    configs = {MODEL: addition.config, added: addition.models[added].config}
    companions = agree_on_files(folders.local, configs, MODEL)
    addition = say(addition, companions.notes)
    folders.check_tokenizer(addition.config)
    known = merged.statistics(addition)
    texts = {added: load_documents(data, "data")}
    if progress:
        print(addition.shared_in_words, flush=True)
    larger = {layer: seen.with_one_more() for layer, seen in known.items()}
    addition = route(addition, texts, folders.tokenizer_file, known=larger, progress=progress)
    return to_folder(addition, folders, put=addition.put_beside, put_last=companions.put)


@dataclass(frozen=True)
class Merged:
    """A merged model with router statistics.

    Attributes:
        folder: of it.
        record: what its record says.
        options: of the merge, in the model's dtype.
        experts: names of its models, in the order of its experts.
    """

    folder: Path
    record: Mapping[str, Any]
    options: MergingOptions
    experts: Sequence[str]

    def new_name(self, fine_tune: str | Path, name: str | None) -> str:
        """The name of a new model.

        Raises:
            UpcyclingError: the model has an expert of that name.
        """
        added = name if name is not None else Path(fine_tune).expanduser().resolve().name
        if not added or added in (*self.experts, MODEL):
            raise UpcyclingError(
                f"name={added!r} is not a name of its own: {self.folder} has experts of "
                f"{', '.join(self.experts)}, and {MODEL!r} is this model itself. Give the new "
                f"another one, as in {setting('name', f'{added or MODEL}_2')}."
            )
        return added

    def plan(self, added: str, fine_tune: Located) -> Addition:
        """Plan one more expert, reading headers and configs only."""
        return plan_addition(
            CheckpointReader(self.folder),
            read_config(self.folder),
            self._dense_config(),
            self.experts,
            added,
            opened(fine_tune),
            self.options,
        )

    def statistics(self, addition: Addition) -> dict[int, Moments]:
        """What the model's routers saw.

        Raises:
            UpcyclingError: they are damaged, or the routers are not what was made of them.
        """
        moments = read_statistics(
            self.folder,
            layers=addition.resolved.moe_layers,
            models=len(self.experts),
            hidden_size=addition.resolved.hidden_size,
            sha256=self.record["statistics"]["sha256"],
        )
        if not follows(addition, addition.moe, moments):
            raise UpcyclingError(
                f"The routers of {self.folder} are not what its statistics give: the model was "
                "trained, or changed, since it was merged. Add the expert to the merged model as "
                "it was, and train that."
            )
        return moments

    def _dense_config(self) -> "PreTrainedConfig":
        return read_config(self.folder / STATISTICS_FOLDER)


_WHAT = "An expert is added to what a merge made that keeps router statistics (docs/merging.md)."


def read_merged(folder: Path) -> Merged:
    """A merged model, by its record.

    Raises:
        UpcyclingError: no merge of ours, or one without router statistics.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise UpcyclingError(
            f"{folder} has no {RECORD_FILE}: it is not the folder of a merged model. {_WHAT}"
        )
    try:
        record = read_json(path)
        method = record["method"]
        if method in (Merging.method, Addition.method) and "statistics" in record:
            return Merged(folder, record, _options(record), list(record["experts"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UpcyclingError(f"{path} cannot be used: {error!r}. Copy the folder again.") from error
    if method != Merging.method:
        raise UpcyclingError(f"{folder} was made by {method}, not merged. {_WHAT}")
    raise UpcyclingError(
        f"{folder} was merged without router statistics, so that nothing is known of what its "
        f"routers saw. Merge again, with {setting('router_init', 'prototype')}, "
        f"{setting('calibration')} and {setting('statistics', True)}."
    )


def _options(record: Mapping[str, Any]) -> MergingOptions:
    known = {field.name for field in fields(MergingOptions)}
    asked = {name: value for name, value in record["options"].items() if name in known}
    return make_merging_options(**asked | {"dtype": record["dtype"]})


def follows(addition: Addition, routers: Any, moments: Mapping[int, Moments]) -> bool:
    """Whether routers are those that these moments give, but for rounding.

    Args:
        routers: tensors of the MoE that has them.
    """
    family = addition.architecture
    initialise: Callable[[Moments], torch.Tensor] = addition.asked.router_init  # type: ignore
    for layer, seen in moments.items():
        found = routers.tensor(family.layer_prefix(addition.config, layer) + family.router_name)
        expected = initialise(seen).to(found.dtype).float()
        if (found.float() - expected).abs().max() > _ROUNDING * expected.abs().max():
            return False
    return True


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record: there is no older version's."""
    return dict(options)


def replan(record: Mapping[str, Any]) -> Callable[[Located, Path], Addition]:
    """From a record, a function (merged model, output folder) that plans it again.

    The router's rows are taken as they stand in the output, and must be what its statistics give,
    which in turn must begin with those of the model.

    Raises:
        UpcyclingError: the function, for sources that cannot be used.
        ProofError: the function, for an output whose router or statistics are not its own.
    """
    added, experts = record["added"], list(record["experts"])
    new = record["sources"][added]
    fine_tune, base = new["name"], new["base"]["name"] if "base" in new else None

    def planned(at: Located, output: Path) -> Addition:
        source = at.adapter or at.folder  # an adapter has no record of ours, and is refused
        merged = read_merged(source)
        if [*merged.experts, added] != experts:
            raise UpcyclingError(
                f"{source} has experts of {', '.join(merged.experts)}: {output} was made of "
                "another model. Name that one."
            )
        addition = merged.plan(added, locate_model(fine_tune, base))
        known = merged.statistics(addition)
        held = read_statistics(
            output,
            layers=addition.resolved.moe_layers,
            models=len(experts),
            hidden_size=addition.resolved.hidden_size,
            sha256=record["statistics"]["sha256"],
        )
        reader = CheckpointReader(output)
        for layer, seen in known.items():
            if not torch.equal(held[layer].means_ND[:-1], seen.means_ND):
                raise ProofError(
                    f"The statistics of {output} do not begin with those of {source} (layer "
                    f"{layer})."
                )
        if not follows(addition, reader, held):
            raise ProofError(f"The router of {output} is not what its statistics give.")
        family, config = addition.architecture, addition.config
        rows = {
            layer: reader.tensor(family.layer_prefix(config, layer) + family.router_name)
            for layer in held
        }
        return addition.with_router(rows, {})

    return planned
