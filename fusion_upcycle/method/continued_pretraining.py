"""Continued training, by itself and after sparse upcycling."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import auto_register_config
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only

from fusion_upcycle.checks import require_flag
from fusion_upcycle.errors import UpcyclingError, setting, spelled, unknown
from fusion_upcycle.live.loading import as_folder, load_tokenizer, require_findable
from fusion_upcycle.method.arguments import sort_arguments, takes_options
from fusion_upcycle.method.pool import (
    FUSION_BENCH_KEYS,
    load_eagerly,
    named_texts,
    plain,
    require_pretrained,
)
from fusion_upcycle.method.sparse_upcycling import SparseUpcyclingAlgorithm
from fusion_upcycle.method.spelling import overrides_at, spelled_by_maker
from fusion_upcycle.report.program import has_saved, prepare
from fusion_upcycle.report.record import Measured, hydra_output_folder, write_run_record
from fusion_upcycle.tables.images import Known
from fusion_upcycle.training.options import TrainingOptions, make_training_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion_upcycle.training.run import Origin, Places
    from fusion_upcycle.training.sharding import Part

log = logging.getLogger(__name__)


@auto_register_config
@takes_options(TrainingOptions)
class ContinuedPretrainingAlgorithm(BaseAlgorithm):
    """Training of the pool's model, dense or MoE, by its objective; returns it, saves its folder.

    Args:
        data: name of a source -> documents, see `fusion_upcycle.texts.documents`; a mapping may say
            `tokens: N` for the first N tokens only. `demo` is the shipped text. For the objectives
            with examples see `fusion_upcycle.tables.pairs` and `.images`.
        save_checkpoint: folder to write; None keeps the result in memory only.
        validation: held out, likewise.
        tokenizer: path or Hub id; None is the pool's.
        processor: of images, folder or Hub id; None is the pool's.
        clip_model: of a vision tower: the whole CLIP model whose texts judge, folder or Hub id.
        optimizer_state: folder of an earlier run whose AdamW moments to begin with.
        work_folder: of checkpoints and packed data, from which a killed run goes on; None is
            `save_checkpoint` + `.training`, else the run's own folder.
        resume: False starts over where `work_folder` has checkpoints.
        overwrite: replace an earlier output of ours at `save_checkpoint`.
        progress: show a progress bar.
        options: those of `fusion_upcycle.training.options.TrainingOptions`.

    Raises:
        UpcyclingError: an option that cannot be used; `run` raises it for model and data.
    """

    #: Of the run record.
    section = "method"
    # FusionBench's decorator makes an attribute of every argument.
    tokenizer: str | None
    processor: str | None
    clip_model: str | None
    resume: bool
    overwrite: bool
    progress: bool

    def __init__(
        self,
        data: Mapping[str, Any] | str,
        save_checkpoint: str | None = None,
        *,
        validation: Mapping[str, Any] | str | None = None,
        tokenizer: str | None = None,
        processor: str | None = None,
        clip_model: str | None = None,
        optimizer_state: str | None = None,
        work_folder: str | None = None,
        resume: bool = True,
        overwrite: bool = False,
        progress: bool = True,
        **options: Any,
    ):
        keys, given = sort_arguments(self, options)
        super().__init__(**keys)
        for name, flag in (("resume", resume), ("overwrite", overwrite), ("progress", progress)):
            require_flag(name, flag)
        if not data:
            raise UpcyclingError("method.data is not set: give {name: file}, or demo.")
        self._options = make_training_options(**given)
        self._data = named_texts(data, "continued", "method.data") or {}
        self._validation = named_texts(validation, "validation", "method.validation")
        self._output, self._state, self._work = (
            None if path is None else Path(path).expanduser()
            for path in (save_checkpoint, optimizer_state, work_folder)
        )

    @property
    def processes(self) -> int:
        """Number of processes that train, on all machines together."""
        return self._options.devices * self._options.num_nodes

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self._options.strategy == "fsdp"

    @spelled_by_maker
    def run(self, modelpool: "BaseModelPool | PreTrainedModel") -> "PreTrainedModel":
        """Train `_pretrained_` of a pool, or a model.

        Raises:
            UpcyclingError: see `fusion_upcycle.training.run.train`.
        """
        from fusion_upcycle.training.run import Origin, upcycling_of

        prepare(self._program)
        processor = self.load_processor(modelpool)
        if not isinstance(modelpool, BaseModelPool):
            return self.train(modelpool, processor, Origin(type(modelpool).__name__))
        require_pretrained(modelpool)
        found = as_folder(plain(modelpool._models["_pretrained_"]))
        name = "in memory" if found is None else found[1]
        require_findable(None if found is None else name, "modelpool.models._pretrained_")
        # Only a state of the dense model has to be carried over to the experts.
        made = None if self._state is None else upcycling_of(name)
        with Measured() as loading:
            if self.sharded and found is not None:
                auto_class, _, options = found
                model: Any = self.load_part(name, auto_class, options)
            else:
                model = load_eagerly(modelpool, "_pretrained_")
        return self.train(model, processor, Origin(name, made, loading.wall_seconds))

    def load_part(
        self, folder: str, auto_class: Any = None, options: Mapping[str, Any] | None = None
    ) -> "Part":
        """What this process trains of the model of a folder."""
        from fusion_upcycle.training.sharding import load_part

        return load_part(folder, self._options, auto_class=auto_class, **options or {})

    def load_processor(self, modelpool: Any) -> Any:
        """The tokenizer or image processor that was asked for, else the pool's.

        Raises:
            UpcyclingError: there is neither, or no such folder.
        """
        pooled = getattr(modelpool, "tokenizer", None)
        for given, where in (
            (self.processor, "method.processor"),
            (self.tokenizer, "method.tokenizer"),
            (pooled, "modelpool.tokenizer"),
        ):
            require_findable(given, where)
        if self.processor is not None:
            from transformers import AutoImageProcessor

            return AutoImageProcessor.from_pretrained(self.processor)
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer)
        if getattr(modelpool, "_processor", None) is not None:
            return modelpool.load_processor()
        if pooled is None:
            raise UpcyclingError(
                "There is no tokenizer and no image processor: set method.tokenizer or "
                "method.processor (path or Hub id), or run with a model pool that has one "
                "(modelpool.tokenizer, modelpool.processor)."
            )
        return modelpool.load_tokenizer()

    def train(
        self, model: "PreTrainedModel | Part", processor: Any, origin: "Origin"
    ) -> "PreTrainedModel":
        """Train a model, or this process's part of one, and leave the run record."""
        from fusion_upcycle.training.objectives.clip import ClipTexts
        from fusion_upcycle.training.run import train
        from fusion_upcycle.training.summary import in_one_line

        clip = None if self.clip_model is None else ClipTexts(self.clip_model, _known_classes)
        trained = train(
            model,
            processor,
            self._options,
            data=self._data,
            places=self.places(),
            origin=origin,
            validation=self._validation,
            optimizer_state=self._state,
            clip=clip,
            progress=self.progress,
        )
        record = {"algorithm": type(self).__name__} | trained.record
        if self._output is not None:
            record["output"] = str(self._output)
            has_saved(self._program, self._output)
        self._leave(record)
        rank_zero_only(log.info)(in_one_line(trained.record, self._output))
        return trained.model

    @rank_zero_only
    def _leave(self, record: dict[str, Any]) -> None:
        if path := write_run_record(self.section, record):
            log.info("Run record: %s", path)

    def places(self) -> "Places":
        """Where the run reads and writes.

        Raises:
            UpcyclingError: nothing says where checkpoints are to be.
        """
        from fusion_upcycle.training.run import Places

        run = hydra_output_folder()
        work = self._work
        if work is None and self._output is not None:
            work = self._output.with_name(self._output.name + ".training")
        if work is None and run is not None:
            work = Path(run) / "training"
        if work is None:
            raise UpcyclingError(
                f"There is no place for checkpoints: pass {setting('save_checkpoint', 'FOLDER')} "
                f"or {setting('work_folder', 'FOLDER')}."
            )
        log_folder = work if run is None else Path(run)
        return Places(work, log_folder / "logs", self._output, self.overwrite, self.resume)


def _known_classes(name: str) -> Known | None:
    """What FusionBench calls the classes of its data sets, as its task pools do."""
    if name not in CLIPTemplateFactory.get_available_datasets():
        return None
    return Known(*CLIPTemplateFactory.get_classnames_and_templates(name))


@auto_register_config
class UpcycleAndTrainAlgorithm(BaseAlgorithm):
    """Sparse upcycling of the pool's dense model, then training of the MoE, in one run.

    The run record has both: the conversion in `method`, the training in `training`. With
    `training.strategy=fsdp` the first process writes the MoE to a folder, and each loads its part.

    Args:
        upcycling: options of `SparseUpcyclingAlgorithm`.
        training: options of `ContinuedPretrainingAlgorithm`.

    Raises:
        UpcyclingError: an option of the two that cannot be used, or a conversion that is to be
            written.
    """

    def __init__(self, upcycling: Any, training: Any, **kwargs: Any):
        for name in kwargs:
            if name not in FUSION_BENCH_KEYS:
                raise unknown("option of the method:", name, ("upcycling", "training"))
        super().__init__(**kwargs)
        with spelled(overrides_at("method.upcycling")):
            self._first: SparseUpcyclingAlgorithm = instantiate(upcycling, _recursive_=False)
        with spelled(overrides_at("method.training")):
            self._second: ContinuedPretrainingAlgorithm = instantiate(training, _recursive_=False)
        self._second.section = "training"
        if self._second.sharded:
            return
        if self._second.processes > 1 and self._first.save_checkpoint is not None:
            raise UpcyclingError(
                "upcycling.save_checkpoint cannot be written by several processes at once: pass "
                "method.training.strategy=fsdp, or method.upcycling.save_checkpoint=null, so that "
                "each upcycles in memory, or run method=sparse_upcycling first."
            )
        if not self._first.return_model:
            raise UpcyclingError(
                "upcycling.return_model=false leaves nothing to train. Pass "
                "method.upcycling.return_model=true."
            )

    def run(self, modelpool: BaseModelPool) -> "PreTrainedModel":
        """Upcycle `_pretrained_` of the pool, and train the result.

        Raises:
            UpcyclingError: see `fusion_upcycle.upcycle` and `fusion_upcycle.training.run.train`.
        """
        from fusion_upcycle.training.run import Origin, upcycling_of

        prepare(self._program)
        self._second._program = self._program
        processor = self._second.load_processor(modelpool)
        if self._second.sharded:
            folder = self._made_once(modelpool)
            with spelled(overrides_at("method.training")):
                with Measured() as loading:
                    part = self._second.load_part(str(folder))
                origin = Origin(str(folder), upcycling_of(str(folder)), loading.wall_seconds)
                return self._second.train(part, processor, origin)
        with spelled(overrides_at("method.upcycling")):
            moe = self._first.run(modelpool)
        assert moe is not None
        name = self._first.save_checkpoint or "sparse upcycling in memory"
        with spelled(overrides_at("method.training")):
            origin = Origin(name, self._first._options.to_json())
            return self._second.train(moe, processor, origin)

    def _made_once(self, modelpool: BaseModelPool) -> Path:
        """The MoE's folder, written by the first process, or by an earlier run of the same."""
        from fusion_upcycle.training import launching
        from fusion_upcycle.training.processes import is_first, together

        training, given = self._second._options, self._first.save_checkpoint
        with spelled(overrides_at("method.training")):
            launching.start(training.devices, training.num_nodes, training.accelerator)
            folder = self._second.places().work / "upcycled" if given is None else Path(given)
        folder = folder.expanduser()
        with together(lambda reason: f"Writing {folder} failed: {reason}."):
            if is_first() and not self._first.has_made(modelpool, folder):
                self._first.save_checkpoint, self._first.return_model = str(folder), False
                with spelled(overrides_at("method.upcycling")):
                    self._first.run(modelpool)
        return folder
