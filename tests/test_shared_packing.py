"""Two processes that pack one text: the stream of one process, and the work of both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import two_ranks
from tiny_training import TOKENIZER, documents

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.texts import tokens
from fusion_upcycle.training import data
from fusion_upcycle.training.processes import is_first

EOS = 256
AT_ONCE = 3


def texts(count: int) -> list[str]:
    """As a source of the data: the first process alone reads it."""
    assert is_first()
    return documents(count)


def source(count: int) -> dict[str, Any]:
    return {"_target_": "test_shared_packing.texts", "count": count}


def pack(specification: Any, cache: Path) -> data.PackedText:
    (text,) = data.pack_sources({"numbers": specification}, TOKENIZER, cache, separator=EOS)
    return text


def of_two(folder: Path) -> None:
    """Pack, again, the first tokens only, and what one of the two cannot."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    tokens._DOCUMENTS_AT_ONCE = AT_ONCE
    original, mine = tokens.encode, []

    def encode(tokenizer: Any, batch: list[str]) -> list[list[int]]:
        mine.append(len(batch))
        if "broken" in batch:
            raise OSError("no space left")
        return original(tokenizer, batch)

    data.encode = encode  # type: ignore[attr-defined]
    found = [pack(source(20), folder / "cache").digest]
    found += [pack(source(20), folder / "cache").digest]
    rows = folder / "rows.jsonl"
    if rank == 0:
        rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(20)))
    dist.barrier()
    limited = {"path": "json", "data_files": str(rows), "split": "train", "tokens": 50}
    found += [pack(limited, folder / "cache").digest]
    (folder / f"{rank}.json").write_text(json.dumps({"digests": found, "batches": mine}))
    rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in "abc") + '{"text": "broken"}')
    dist.barrier()
    with pytest.raises(UpcyclingError, match=r"Packing data\.numbers .*no space left"):
        pack(str(rows), folder / "cache")
    dist.destroy_process_group()


@pytest.mark.early
def test_two_processes_pack_the_stream_of_one(tmp_path: Path) -> None:
    two_ranks(of_two, tmp_path, folder=tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    whole = pack(source(20), tmp_path / "alone")
    assert first["digests"] == second["digests"]
    assert first["digests"][:2] == [whole.digest] * 2
    limited = next(
        folder
        for folder in (tmp_path / "cache").iterdir()
        if json.loads((folder / "facts.json").read_text())["digest"] == first["digests"][2]
    )
    assert (limited / "tokens.bin").read_bytes() == whole.stream[:50].tobytes()
    # 7 batches of 20 documents, and two or three of the 50 tokens, in turns.
    assert 4 <= len(first["batches"]) <= 7 and 3 <= len(second["batches"]) <= 6
    assert sum(first["batches"] + second["batches"]) < 20 + 20
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_process_that_does_not_see_the_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pack(source(3), tmp_path)
    (folder,) = tmp_path.iterdir()
    monkeypatch.setattr(data, "_SEEN", 0.0)
    with pytest.raises(UpcyclingError, match="work_folder must be one folder for all"):
        data._opened(folder.with_name("elsewhere"))
    assert data._opened(folder).tolist() == text.stream.tolist()


def test_one_that_cannot_talk_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("some text")
    monkeypatch.setattr(data, "_PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        with pytest.raises(UpcyclingError, match=r"has not packed data\.numbers"):
            pack(str(rows), tmp_path / "cache")
    first = pack(str(rows), tmp_path / "cache")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pack(str(rows), tmp_path / "cache").digest == first.digest
