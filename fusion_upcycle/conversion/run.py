"""Any planned conversion to a folder or to a live model: written, proven, recorded.

folders = open_folders({"source": "./llama"}, "./moe", verify="auto")   # checks, before any work
to_folder(plan(...), folders)                                          # streams
to_model(plan(...), model, verify="auto")                              # in memory
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checkpoint.adapter_config import WEIGHTS_FILE, read_adapter_config
from fusion_upcycle.checkpoint.located import Located, locate_model
from fusion_upcycle.checkpoint.place import check_name
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import check_companions, copy_companions, locate, read_config
from fusion_upcycle.conversion.adapted import open_tensors, put_on
from fusion_upcycle.conversion.conversion import Conversion
from fusion_upcycle.conversion.live import fill_live
from fusion_upcycle.conversion.output import Converted, OutputOptions, write_output
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.live.tensors import LiveTensorsOnCPU
from fusion_upcycle.verification.function import Models, take_sample
from fusion_upcycle.verification.loading import check_load_keys, load_model
from fusion_upcycle.verification.names import check_written_config
from fusion_upcycle.verification.proof import Proof, resolve_mode
from fusion_upcycle.verification.tensors import check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: The name of a source model that has no other.
SOURCE = "source"


@dataclass(frozen=True)
class Folders:
    """What a conversion reads and writes, checked before any work.

    Attributes:
        given: name of each source model -> folder or Hub id, as the user gave it.
        local: name of each source model -> its local folder; of an adapter, that of its base.
        adapters: name of each source model that is an adapter -> its local folder.
        bases: name of an adapter -> its base model, as the user gave it, where that was done.
        main: the model whose tokenizer, template, generation and licence files the result gets.
        output: folder to make.
        verify: mode of the proof.
        writing: how the output is written.
    """

    given: Mapping[str, str | Path]
    local: Mapping[str, Path]
    main: str
    output: Path
    verify: str
    writing: OutputOptions
    adapters: Mapping[str, Path] = field(default_factory=dict)
    bases: Mapping[str, str | Path] = field(default_factory=dict)

    def at(self, name: str) -> Located:
        """Where a source model is."""
        return Located(self.local[name], self.adapters.get(name))

    @property
    def source(self) -> Path:
        """The local folder of the main model."""
        return self.local[self.main]

    @property
    def tokenizer_file(self) -> Path:
        return self.source / "tokenizer.json"

    def check_tokenizer(self, config: "PreTrainedConfig") -> None:
        """Refuse a tokenizer of another model, before any text is run through this one.

        Raises:
            UpcyclingError: it is damaged, or gives ids that the model has not.
        """
        take_sample(self.tokenizer_file, config)

    def to_json(self) -> dict[str, Any]:
        """Identity of each source model, for the record: enough to notice that it has changed."""
        return {
            name: identity_of_source(given, self.at(name), self.bases.get(name))
            for name, given in self.given.items()
        }


def open_folders(
    given: Mapping[str, str | Path],
    output: str | Path,
    *,
    main: str | None = None,
    bases: Mapping[str, str | Path] | None = None,
    verify: str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    push_to_hub: str | None = None,
) -> Folders:
    """Locate the source models, and refuse what stands in the way of the output.

    Args:
        given: name of each source model -> local folder or Hugging Face Hub id.
        main: the one whose tokenizer and other files the result gets; None is the first.
        bases: name of an adapter -> its base model, where its own file is not to say it. None
            where adapters cannot be taken.

    Raises:
        UpcyclingError: a source that is not there, a damaged tokenizer file, an output that is
            there already or holds a source, options that are none.
    """
    resolve_mode(verify, streaming=True)
    writing = OutputOptions(overwrite, max_shard_size, progress, push_to_hub)
    for path in (*given.values(), *(bases or {}).values(), output):
        check_name(path)
    output = Path(os.path.realpath(Path(output).expanduser()))
    located = {
        name: Located(locate(source)) if bases is None else locate_model(source, bases.get(name))
        for name, source in given.items()
    }
    local = {name: at.folder for name, at in located.items()}
    adapters = {name: at.adapter for name, at in located.items() if at.adapter is not None}
    for name, folder in [*local.items(), *adapters.items()]:
        if folder.resolve().is_relative_to(output):
            which = "the source" if len(local) == 1 else f"model {name}"
            raise UpcyclingError(
                f"{output} is {which} itself, or holds it ({folder}). Choose another output."
            )
    writing.check(output)
    main = next(iter(local)) if main is None else main
    check_companions(local[main])
    used = {name: base for name, base in (bases or {}).items() if name in adapters}
    return Folders(given, local, main, output, verify, writing, adapters, used)


def to_folder(
    conversion: Conversion,
    folders: Folders,
    *,
    put: Callable[[Path], Mapping[str, str] | None] | None = None,
    put_last: Callable[[Path], list[str]] | None = None,
    resumable: bool = True,
) -> Converted:
    """Stream a planned conversion to its folder; neither model is ever in memory.

    Args:
        put: puts what this conversion has beside its weights into the staged folder, and returns
            name -> SHA-256 of files that it hashed while it wrote them.
        put_last: puts files beside those of the main model, or in their place; returns their names.
        resumable: whether the record tells exactly what is converted.

    Raises:
        UpcyclingError: a tokenizer of another model, a full disk.
        ProofError: the result is not what it claims to be; nothing is left behind.
    """
    # Before the writing: a tokenizer of another model is refused first.
    prove = _prover(conversion, folders.at(folders.main), folders.verify, folders.writing.progress)

    def companions(staging: Path) -> list[str]:
        copied = copy_companions(folders.source, staging)
        return copied + [
            name
            for name in (put_last(staging) if put_last is not None else [])
            if name not in copied
        ]

    return write_output(
        conversion,
        folders.output,
        sources=folders.to_json(),
        main=folders.main,
        companions=companions,
        prove=prove,
        options=folders.writing,
        put=put,
        cards=dict(folders.local) | dict(folders.adapters),
        resumable=resumable,
        proven=folders.verify != "none",
    )


def prove_folder(
    conversion: Conversion, source: Located, result: Path, *, mode: str, progress: bool
) -> Proof:
    """Prove the folder `result` against the model that it was made from."""
    return _prover(conversion, source, mode, progress)(result)


def _prover(
    conversion: Conversion, source: Located, mode: str, progress: bool
) -> Callable[[Path], Proof]:
    sample = take_sample(source.folder / "tokenizer.json", conversion.config)
    mode = resolve_mode(mode, streaming=True)
    load = partial(load_model, dtype=conversion.dtype, progress=progress)

    def prove(result: Path) -> Proof:
        written = _open_result(conversion, result)
        if mode != "none":
            check_load_keys(result)
        return conversion.prove(
            written,
            mode=mode,
            sample=sample,
            models=Models(
                # A source may be read in another family's words; a result says what it is.
                lambda: _with_adapter(load(source.folder, conversion.source_config), source),
                lambda: load(result, read_config(result)),
            ),
            progress=progress,
        )

    return prove


def to_model(
    conversion: Conversion,
    source: "PreTrainedModel",
    *,
    verify: str,
    tokenizer_file: Path | None = None,
    progress: bool = False,
) -> tuple["PreTrainedModel", Proof]:
    """Fill transformers' own class with the planned tensors, and prove the result.

    Args:
        conversion: planned from live models.
        source: the model, or the first of them; the result gets its device, mode and generation
            config.
        verify: mode of the proof.
        tokenizer_file: `tokenizer.json` for the proof's tokens.

    Raises:
        UpcyclingError: a tokenizer of another model.
        ProofError: the result is not what it claims to be.
    """
    sample = take_sample(tokenizer_file, conversion.config)
    mode = resolve_mode(verify, streaming=False)
    made = fill_live(conversion, source)
    proof = conversion.prove(
        LiveTensorsOnCPU(made, conversion.architecture, conversion.specs),
        mode=mode,
        sample=sample,
        models=Models(lambda: source, lambda: made),
        progress=progress,
    )
    return made, proof


def save_model(
    conversion: Conversion,
    proof: Proof,
    output: Path,
    *,
    sources: Mapping[str, Mapping[str, Any]],
    companions: Callable[[Path], list[str]],
    options: OutputOptions,
) -> Converted:
    """Write the folder of a live conversion, through the same writer as a streamed one.

    Args:
        proof: of the live model; every tensor of the folder is compared with it again.
        sources: what the record says of each source model.
        companions: writes tokenizer and generation files into the folder, returns their names.
    """

    def prove_written(folder: Path) -> Proof:
        written = _open_result(conversion, folder)
        if proof.mode != "none":
            check_load_keys(folder)
            check_tensors(conversion, written, progress=options.progress)
        return proof

    return write_output(
        conversion,
        output,
        sources=sources,
        main=next(iter(sources)),
        companions=companions,
        prove=prove_written,
        options=options,
        resumable=False,  # nothing tells one live model from another
        proven=proof.mode != "none",
    )


def _with_adapter(model: "PreTrainedModel", source: Located) -> "PreTrainedModel":
    """A live base model with the adapter on it, where there is one."""
    if source.adapter is not None:
        put_on(model, open_tensors(source, read_config(source.folder)))
    return model


def _open_result(conversion: Conversion, folder: Path) -> CheckpointReader:
    """The written tensors of `conversion`, once its config.json is known to say what was planned.

    Raises:
        ProofError: another config, or files that cannot be read.
    """
    check_written_config(folder, conversion.config)
    try:
        return CheckpointReader(folder, read_once=True)
    except UpcyclingError as error:
        raise ProofError(f"The output cannot be read: {error}") from error


def identity_of_source(
    given: str | Path, at: Located, base: str | Path | None = None
) -> dict[str, Any]:
    """What the record says of a source model: enough to notice that it has changed.

    Of an adapter, that of its file, and that of its base under `base`.
    """
    if at.adapter is not None:
        reader = CheckpointReader(at.adapter, file=WEIGHTS_FILE)
        base = base if base is not None else read_adapter_config(at.adapter).base
        assert base is not None
        below = {"base": identity_of_source(base, Located(at.folder))}
    else:
        reader, below = CheckpointReader(at.folder), {}
    place = Path(given).expanduser()
    return {
        "name": str(place.absolute() if place.exists() else given),
        "from_hub": not place.exists(),
        "files": {file.name: file.stat().st_size for file in reader.files},
        "modified": max(file.stat().st_mtime_ns for file in reader.files),
        # Set by the system itself: a file replaced by one of the same size and time shows here.
        "changed": max(file.stat().st_ctime_ns for file in reader.files),
        **below,
    }
