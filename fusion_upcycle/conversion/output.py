"""An output folder: shards, config, companions, record and model card, all or nothing."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from fusion_upcycle.architectures.config import readable_config
from fusion_upcycle.checkpoint.digests import seal
from fusion_upcycle.checkpoint.staging import RECORD_FILE, check_output, staging_folder
from fusion_upcycle.checkpoint.writer import parse_size, plan_shards, write_shards
from fusion_upcycle.checks import dtype_name, require_flag
from fusion_upcycle.conversion.card import model_card
from fusion_upcycle.conversion.conversion import Conversion
from fusion_upcycle.conversion.finite import finite
from fusion_upcycle.conversion.hub import check_upload, upload
from fusion_upcycle.conversion.inherited import inherited
from fusion_upcycle.errors import without_braces
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.report.record import Measured, versions
from fusion_upcycle.verification.proof import Proof


@dataclass(frozen=True)
class OutputOptions:
    """How an output folder is written; nothing here changes a bit of its tensors.

    Attributes:
        overwrite: replace an earlier output of ours.
        max_shard_size: of the files, as in "5GB".
        progress: show progress bars.
        push_to_hub: `ORG/NAME` on the Hugging Face Hub, to upload the finished folder to.
    """

    overwrite: bool = False
    max_shard_size: int | str = "5GB"
    progress: bool = True
    push_to_hub: str | None = None

    def check(self, output: Path) -> None:
        """Fail before any work when the output cannot be written."""
        require_flag("overwrite", self.overwrite)
        parse_size(self.max_shard_size)
        check_upload(self.push_to_hub)
        check_output(output, overwrite=self.overwrite)


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        output: the folder.
        proof: what was proven.
        record: contents of the folder's `upcycling.json`.
        costs: wall and CPU seconds of writing and proving, peak memory.
        uploaded: address of the folder on the Hugging Face Hub.
    """

    output: Path
    proof: Proof
    record: dict[str, Any]
    costs: dict[str, dict[str, float | int]]
    uploaded: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What its maker should know beside the proof, in sentences."""
        notes = self.record.get("inherited", {}).get("notes", ())
        return (*notes, f"Uploaded: {self.uploaded}") if self.uploaded else tuple(notes)


def write_output(
    conversion: Conversion,
    output: Path,
    *,
    sources: Mapping[str, Mapping[str, Any]],
    main: str,
    companions: Callable[[Path], list[str]],
    prove: Callable[[Path], Proof],
    options: OutputOptions,
    put: Callable[[Path], Mapping[str, str] | None] | None = None,
    cards: Mapping[str, Path] | None = None,
    resumable: bool = True,
    proven: bool = True,
) -> Converted:
    """Write a planned conversion, prove it, and only then let the folder appear.

    Args:
        sources: what the record says of each source model: name, whether it is from the Hub, its
            files.
        main: the model that the result's tokenizer and other files are of.
        companions: puts tokenizer, template, generation and licence files into the staged folder
            and returns their names.
        prove: staged folder -> proof; an error leaves no output.
        put: puts what else this conversion has into the staged folder, before the companions, and
            returns name -> SHA-256 of files that it hashed while it wrote them.
        cards: name of each source model -> folder, whose card the result's takes over from.
        resumable: whether the record tells exactly what is converted, so that the shards of a
            killed run can be kept.
        proven: whether `prove` proves; then all weights must be finite.
    """
    output = Path(os.path.realpath(output))
    shards = plan_shards(conversion.specs, options.max_shard_size)
    total = conversion.total_bytes
    record: dict[str, Any] = {
        "name": output.name,
        "source": sources[main],
        **conversion.record(sources),
        "bytes": total,
        "shards": [shard.file for shard in shards],
        "versions": versions(),
    }
    fingerprint = record if resumable else {"run": uuid4().hex}
    with staging_folder(
        output,
        fingerprint,
        total_bytes=total + conversion.bytes_beside,
        overwrite=options.overwrite,
        shards=record["shards"] if resumable else (),
    ) as staging:
        with Measured() as writing, progress_bar("Writing", total, options.progress) as bar:
            chunks = finite(conversion.chunks) if proven else conversion.chunks
            hashed = write_shards(staging, shards, chunks, bar.update)
            if put is not None:
                hashed |= put(staging) or {}
            _write_json(staging / "config.json", readable_config(conversion.config))
            if conversion.architecture.ships is not None:
                shutil.copy(conversion.architecture.ships, staging)
            record["copied_files"] = companions(staging)
            if cards and (found := inherited(cards)):
                record["inherited"] = found
        with Measured() as proving:
            proof = prove(staging)
        record |= {"proof": proof.to_json(), "proof_in_words": without_braces(proof.words)}
        (staging / "README.md").write_text(model_card(conversion, record), encoding="utf-8")

        def write_record(files: dict[str, str]) -> None:
            record["files"] = files
            _write_json(staging / RECORD_FILE, record)

        seal(staging, RECORD_FILE, write_record, hashed)
    uploaded = options.push_to_hub and upload(output, options.push_to_hub)
    costs = {"write": writing.as_record(), "prove": proving.as_record()}
    return Converted(output, proof, record, costs, uploaded)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    # config.json holds one thing that is not JSON: the dtype.
    path.write_text(
        json.dumps(data, indent=2, default=dtype_name, allow_nan=False) + "\n", encoding="utf-8"
    )
