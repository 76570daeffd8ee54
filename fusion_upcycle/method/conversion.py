"""What the FusionBench algorithms that make an MoE have in common."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseAlgorithm, BaseModelPool

from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.architectures.layout import model_class
from fusion_upcycle.checkpoint.located import locate_model
from fusion_upcycle.checkpoint.source import read_config
from fusion_upcycle.checks import AUTO, require_flag
from fusion_upcycle.conversion.output import OutputOptions
from fusion_upcycle.conversion.run import SOURCE, save_model
from fusion_upcycle.errors import UpcyclingError, setting, stopped_by_signals, unknown
from fusion_upcycle.live.loading import load_folder
from fusion_upcycle.method.pool import (
    PooledFolder,
    load_pooled,
    made_whole,
    own_folders,
    pooled_folder,
    require_own_tokenizer,
    require_pretrained,
    tokenizer_file,
)
from fusion_upcycle.method.spelling import spelled_by_maker
from fusion_upcycle.report.program import has_saved, prepare
from fusion_upcycle.report.record import write_run_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion_upcycle.conversion.conversion import Conversion
    from fusion_upcycle.conversion.output import Converted
    from fusion_upcycle.verification.proof import Proof

log = logging.getLogger(__name__)


class ConversionAlgorithm(BaseAlgorithm):
    """Checks of arguments and classes, and reports; what is converted, a subclass says."""

    #: Classes of models that are accepted; None leaves that to the families.
    _accepted: tuple[str, ...] | None = None
    _takes_adapters = True
    _targets: tuple[str, ...] = (AUTO, *ARCHITECTURES)
    #: Where models of other classes go.
    _elsewhere: str
    # FusionBench's decorator makes an attribute of every argument.
    save_checkpoint: str | None
    verify: str
    return_model: bool
    _writing: OutputOptions
    _by_config = False  # set by `spelled_by_maker`

    def _check_target(self, target: str) -> None:
        if target not in self._targets:
            raise unknown(f"target of {type(self).__name__}:", str(target), self._targets)

    def _output_options(
        self, overwrite: bool, max_shard_size: int | str, push_to_hub: str | None
    ) -> OutputOptions:
        require_flag("return_model", self.return_model)
        require_flag("overwrite", overwrite)
        if not self.return_model and self.save_checkpoint is None:
            raise UpcyclingError(
                "return_model=false without save_checkpoint would throw the result away. Pass "
                f"{setting('save_checkpoint', 'FOLDER')}."
            )
        if push_to_hub is not None and self.save_checkpoint is None:
            raise UpcyclingError(
                f"push_to_hub={push_to_hub} uploads the folder of the result, and there is none. "
                f"Pass {setting('save_checkpoint', 'FOLDER')}, or {setting('push_to_hub', None)}."
            )
        return OutputOptions(overwrite, max_shard_size, push_to_hub=push_to_hub)

    @property
    def _how(self) -> dict[str, Any]:
        """How a streamed result is made, which changes no bit of it."""
        return {
            "verify": self.verify,
            "overwrite": self._writing.overwrite,
            "max_shard_size": self._writing.max_shard_size,
            "push_to_hub": self._writing.push_to_hub,
        }

    def _check_class(self, name: str) -> None:
        if self._accepted is not None and name not in self._accepted:
            raise UpcyclingError(
                f"{type(self).__name__} takes a {' or '.join(self._accepted)}, not a {name}. "
                f"{self._elsewhere}"
            )

    @spelled_by_maker
    def run(self, modelpool: Any) -> "PreTrainedModel | None":
        """Convert the models of a pool, or models in memory.

        With `save_checkpoint`, and a pool that names folders or Hub ids, the conversion streams
        from folder to folder, and the result is loaded only if `return_model`.

        Raises:
            UpcyclingError: models that cannot be used; a result that cannot be proven.
        """
        # Where a program runs it; else Ctrl-C is Python's own.
        with stopped_by_signals() if self._by_config else nullcontext():
            return self._run(modelpool)

    def _run(self, modelpool: Any) -> "PreTrainedModel | None":
        prepare(self._program)
        output = None if self.save_checkpoint is None else Path(self.save_checkpoint).expanduser()
        if output is not None:
            self._writing.check(output)
        if not isinstance(modelpool, BaseModelPool):
            return self._run_live(self._named(modelpool), output, None)
        names = self._names(modelpool)
        folders = {}
        for name in names:
            found = pooled_folder(modelpool, name, streaming=output is not None)
            if found is not None:
                folders[name] = found
        if output is not None and len(folders) == len(names):
            require_own_tokenizer(modelpool, own_folders(folders, self._bases(folders)))
            return self._run_streaming(folders, output)
        self._check_folders(folders)
        bases, usable = self._bases(folders), folders if self._takes_adapters else {}
        models = {
            name: load_pooled(modelpool, name, usable.get(name), bases.get(name)) for name in names
        }
        return self._run_live(models, output, modelpool)

    def _named(self, model: Any) -> "Mapping[str, PreTrainedModel]":
        """Name -> model of what was given in place of a pool."""
        return {SOURCE: made_whole(model)}

    def _names(self, pool: BaseModelPool) -> Sequence[str]:
        """The models of a pool that are converted."""
        require_pretrained(pool)
        return ["_pretrained_"]

    def _bases(self, folders: Mapping[str, PooledFolder]) -> Mapping[str, str]:
        """Model of the pool -> what it is put on if it is an adapter, where that is said."""
        return {}

    def _check_folders(self, folders: Mapping[str, PooledFolder]) -> None:
        """Refuse models that are about to be loaded, by the folders that they come from."""

    def _stream(self, folders: Mapping[str, PooledFolder], output: Path) -> "Converted":
        """Convert from folders to a folder."""
        raise NotImplementedError

    def _convert(
        self, models: "Mapping[str, PreTrainedModel]", tokenizer_file: Path | None
    ) -> "InMemory":
        """Convert in memory, and prove it."""
        raise NotImplementedError

    def _run_streaming(
        self, folders: Mapping[str, PooledFolder], output: Path
    ) -> "PreTrainedModel | None":
        if self._accepted is not None:
            bases = self._bases(folders)
            for model, folder in folders.items():
                at = locate_model(folder.source, bases.get(model)).folder
                for name in read_config(at).architectures or ():
                    self._check_class(name)
        converted = self._stream(folders, output)
        self._report(converted)
        if not self.return_model:
            return None
        made: PreTrainedModel = load_folder(
            model_class(converted.record["class"]),
            converted.output,
            dtype=converted.record["dtype"],
        )
        return made

    def _run_live(
        self,
        models: "Mapping[str, PreTrainedModel]",
        output: Path | None,
        pool: BaseModelPool | None,
    ) -> "PreTrainedModel":
        for model in models.values():
            self._check_class(type(model).__name__)
        made = self._convert(models, None if pool is None else tokenizer_file(pool))
        sources = {
            name: {"name": type(model).__name__ + " in memory", "from_hub": False}
            for name, model in models.items()
        }
        if output is None:
            self._report_live(made, sources)
            return made.model
        converted = save_model(
            made.conversion,
            made.proof,
            output,
            sources=sources,
            companions=partial(_save_companions, made, pool),
            options=self._writing,
        )
        self._report(converted)
        return made.model

    def _report(self, converted: "Converted") -> None:
        log.info("Written to %s; %s", converted.output, converted.proof)
        for note in converted.notes:
            log.info(note)
        has_saved(self._program, converted.output)
        # What of the folder's record is of the run, and not of its files.
        folders_own = ("name", "shards", "versions", "copied_files", "proof_in_words")
        record = {k: v for k, v in converted.record.items() if k not in folders_own}
        self._record(record | {"output": str(converted.output), "costs": converted.costs})

    def _report_live(self, made: "InMemory", sources: Mapping[str, Any]) -> None:
        log.info("Converted in memory; %s", made.proof)
        self._record(made.conversion.record(sources) | {"proof": made.proof.to_json()})

    def _record(self, record: dict[str, Any]) -> None:
        path = write_run_record("method", {"algorithm": type(self).__name__} | record)
        if path is not None:
            log.info("Run record: %s", path)


@dataclass(frozen=True)
class InMemory:
    """A conversion in memory.

    Attributes:
        model: the result.
        conversion: what it was made by.
        proof: of it.
        put: puts what it has beside its weights into the folder that it is saved to.
    """

    model: "PreTrainedModel"
    conversion: "Conversion"
    proof: "Proof"
    put: Callable[[Path], object] | None = None


def _save_companions(made: InMemory, pool: BaseModelPool | None, folder: Path) -> list[str]:
    """Generation config of a live model, and tokenizer and processor of its pool, if it has any."""
    if made.put is not None:
        made.put(folder)
    before = set(folder.iterdir())
    if made.model.can_generate():
        made.model.generation_config.save_pretrained(folder)
    if pool is not None and getattr(pool, "tokenizer", None) is not None:
        pool.load_tokenizer().save_pretrained(folder)
    if pool is not None and getattr(pool, "_processor", None) is not None:
        pool.load_processor().save_pretrained(folder)
    return sorted(str(path.relative_to(folder)) for path in set(folder.iterdir()) - before)
