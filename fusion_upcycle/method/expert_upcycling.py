"""Expert upcycling: a trained MoE of any supported family grows from E to M experts."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fusion_bench.mixins import auto_register_config

from fusion_upcycle.checkpoint.source import locate, read_config
from fusion_upcycle.checks import dtype_name
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.errors import UpcyclingError, setting, unknown
from fusion_upcycle.expansion.calibration import CALIBRATION_TOKENS
from fusion_upcycle.expansion.live import expand_model
from fusion_upcycle.expansion.moments import check_new_moments, write_expanded_state
from fusion_upcycle.expansion.options import ExpansionOptions, make_expansion_options
from fusion_upcycle.expansion.preparation import IMPORTANCE_FOLDER
from fusion_upcycle.expansion.run import expand
from fusion_upcycle.importance.run import write_importance
from fusion_upcycle.method.arguments import sort_arguments, takes_options
from fusion_upcycle.method.conversion import ConversionAlgorithm, InMemory
from fusion_upcycle.method.pool import (
    PooledFolder,
    named_texts,
    plain,
)
from fusion_upcycle.report.record import hydra_output_folder
from fusion_upcycle.verification.proof import resolve_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

_IMPORTANCE = {"scores": None, "metric": ExpansionOptions.metric}
_CALIBRATION = {"data": None, "tokens": CALIBRATION_TOKENS, "context_length": None}


@auto_register_config
@takes_options(ExpansionOptions, without=["metric"])
class ExpertUpcyclingAlgorithm(ConversionAlgorithm):
    """Growing of a trained MoE from E to M experts by duplicating experts, top-k fixed.

    Args:
        num_experts: as the others, see `options`.
        save_checkpoint: folder to write; None keeps the result in memory only.
        importance: `scores`, the `importance.json` that was measured earlier, or None; `metric`,
            see `options`.
        calibration: `data`, name -> documents (see `fusion_upcycle.texts.documents`) or `demo`;
            `tokens` of it; `context_length`. Router rows are made of it, and experts are scored
            on it where scores are needed and not given.
        optimizer_state: folder of the same model with AdamW's moments, which are expanded into
            `save_checkpoint`.
        new_moments: what new experts begin with there: `copy`, `reset`, `scale`.
        tokenizer: folder or Hub id, where the pool has none.
        verify: `auto`, `layers`, `logits` or `none`; see `fusion_upcycle.expand`.
        return_model: False skips loading a streamed result.
        overwrite: replace an earlier output of ours at `save_checkpoint`.
        max_shard_size: of the files.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload `save_checkpoint` to.
        options: those of `fusion_upcycle.ExpansionOptions`; initialisers may also be config nodes
            with `_target_`.

    Raises:
        UpcyclingError: an option that cannot be used; `run` raises it for the model.
    """

    #: Options that have another place in the config.
    option_places: ClassVar = {
        "calibration": "calibration.data",
        "calibration_tokens": "calibration.tokens",
        "context_length": "calibration.context_length",
        "scores": "importance.scores",
        "metric": "importance.metric",
    }
    _takes_adapters = False
    # FusionBench's decorator makes an attribute of every argument.
    optimizer_state: str | None
    new_moments: str
    tokenizer: str | None

    def __init__(
        self,
        num_experts: int | None = None,
        save_checkpoint: str | None = None,
        *,
        importance: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        optimizer_state: str | None = None,
        new_moments: str = "copy",
        tokenizer: str | None = None,
        verify: str = "auto",
        return_model: bool = True,
        overwrite: bool = False,
        max_shard_size: int | str = "5GB",
        push_to_hub: str | None = None,
        **options: Any,
    ):
        keys, given = sort_arguments(self, options)
        super().__init__(**keys)
        by = _node("importance", importance, _IMPORTANCE)
        text = _node("calibration", calibration, _CALIBRATION)
        self._options = make_expansion_options(
            num_experts=num_experts, metric=by["metric"], **given
        )
        self._inputs = {
            "scores": by["scores"],
            "calibration": named_texts(text["data"], "continued", "method.calibration.data"),
            "calibration_tokens": text["tokens"],
            "context_length": text["context_length"],
            "optimizer_state": optimizer_state,
        }
        check_new_moments(self._options, new_moments, used=optimizer_state is not None)
        if optimizer_state is not None and save_checkpoint is None:
            raise UpcyclingError(
                "optimizer_state is expanded into the folder of the result, and there is none. "
                f"Pass {setting('save_checkpoint', 'FOLDER')}, or "
                f"{setting('optimizer_state', None)}."
            )
        resolve_mode(verify, streaming=False)
        self._writing = self._output_options(overwrite, max_shard_size, push_to_hub)

    def _stream(self, folders: Mapping[str, PooledFolder], output: Path) -> Converted:
        (found,) = folders.values()
        if self.tokenizer is not None:
            raise UpcyclingError(
                f"method.tokenizer={self.tokenizer} would not be used: streaming takes the "
                f"tokenizer of the model's own folder. Pass {setting('tokenizer', None)}."
            )
        _check_dtype(found, locate(found.source))
        converted = expand(
            found.source,
            output,
            new_moments=self.new_moments,
            **self._how,
            **self._inputs,
            **vars(self._options),
        )
        if (measured := converted.output / IMPORTANCE_FOLDER).is_dir():
            log.info("Importance scores: %s", measured)
        self._advise()
        return converted

    def _convert(
        self, models: "Mapping[str, PreTrainedModel]", tokenizer_file: Path | None
    ) -> InMemory:
        (moe,) = models.values()
        folder = None if tokenizer_file is None else tokenizer_file.parent
        made = expand_model(
            moe,
            tokenizer=folder if self.tokenizer is None else locate(self.tokenizer),
            verify=self.verify,
            progress=self._writing.progress,
            **self._inputs,
            **vars(self._options),
        )
        state = None
        if self.optimizer_state is not None:
            state = Path(self.optimizer_state).expanduser()
        expansion = made.expansion.with_state(state, self.new_moments)

        def put(staging: Path) -> None:
            if state is not None:
                write_expanded_state(state, expansion, staging, self.new_moments)
            if made.measured is not None:
                write_importance(made.measured, staging / IMPORTANCE_FOLDER)

        run = hydra_output_folder()
        if self.save_checkpoint is None and made.measured is not None and run is not None:
            log.info("Importance scores: %s", write_importance(made.measured, Path(run))[0])
        self._advise()
        return InMemory(made.model, expansion, made.proof, put)

    def _advise(self) -> None:
        if (advice := self._options.advice) is not None:
            log.info(advice)


def _node(name: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group of options with its defaults."""
    given = plain(given) or {}
    if not isinstance(given, Mapping):
        raise UpcyclingError(f"method.{name}={given!r} must be a mapping of {', '.join(defaults)}.")
    for option in given:
        if option not in defaults:
            raise unknown(f"option in method.{name}:", str(option), defaults)
    return dict(defaults) | dict(given)


def _check_dtype(found: PooledFolder, folder: Path) -> None:
    """An expansion keeps every tensor's dtype."""
    own = read_config(folder).dtype
    if found.dtype is not None and own is not None and dtype_name(found.dtype) != dtype_name(own):
        raise UpcyclingError(
            f"modelpool dtype={found.dtype} cannot be honoured when streaming to "
            f"method.save_checkpoint: the source is {dtype_name(own)}, and its tensors are kept as "
            f"they are. Remove it, or pass {setting('save_checkpoint', None)} to expand in memory."
        )
