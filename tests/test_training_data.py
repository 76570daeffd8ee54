"""Packing and order of training text: nothing dropped, nothing random, resumable anywhere."""

import json
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_training import DATA, TOKENIZER, documents

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.training.data import PackedText, pack_sources
from fusion_upcycle.training.objectives.texts import Windows
from fusion_upcycle.training.order import ExampleOrder, StepSampler
from fusion_upcycle.training.permutation import ORDER_VERSION, permuted

EOS = 256


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def pack(data: Any, folder: Path) -> list[PackedText]:
    return pack_sources(data, TOKENIZER, folder, separator=EOS)


def stream_of(texts: list[str]) -> list[int]:
    """The stream as the module's docstring has it, written once more."""
    return [id for text in texts if text for id in [EOS, *TOKENIZER(text)["input_ids"]]]


def test_the_stream_is_all_documents_with_a_separator_before_each(tmp_path: Path) -> None:
    (text,) = pack(DATA, tmp_path)
    assert text.stream.tolist() == stream_of(documents())
    assert (text.documents, text.separator, text.largest) == (8, EOS, EOS)


@pytest.mark.parametrize("length", [1, 7, 16, 10_000])
def test_windows_drop_nothing_and_pad_nothing(length: int, tmp_path: Path) -> None:
    (text,) = pack(DATA, tmp_path)
    stream = text.stream.tolist()
    windows = [text.window(i, length).tolist() for i in range(text.windows(length))]
    circle = stream * (1 + -(-(length + 1) // len(stream)) + 1)
    inputs = [token for window in windows for token in window[:-1]]
    targets = [token for window in windows for token in window[1:]]
    assert inputs == circle[: len(inputs)]
    assert targets == circle[1 : len(targets) + 1]
    assert len(stream) <= len(inputs) < len(stream) + length


def test_files_of_all_kinds_and_lists(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("x", "yz")))
    data = {"all": [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]}
    (text,) = pack(data, tmp_path / "cache")
    assert text.stream.tolist() == stream_of(["first\n\nsecond", "x", "yz"])


@pytest.mark.parametrize("streaming", [True, False])
def test_the_first_tokens_of_a_data_set(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"words": f"row {i}"}) + "\n" for i in range(100)))
    spec = {"path": "json", "split": "train", "data_files": str(path), "column": "words"}
    spec |= {"tokens": 20, "streaming": streaming}
    (text,) = pack({"rows": spec}, tmp_path / "cache")
    assert text.stream.tolist() == stream_of([f"row {i}" for i in range(9)])[:20]


def test_a_stream_without_a_limit_is_refused(tmp_path: Path) -> None:
    spec = {"path": "json", "split": "train", "streaming": True}
    with pytest.raises(UpcyclingError, match=r"data\.rows is streamed.*tokens: "):
        pack({"rows": spec}, tmp_path)


def test_text_is_packed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(DATA, tmp_path)[0]
    with monkeypatch.context() as patch:
        patch.setattr("fusion_upcycle.training.data._write", lambda *_: pytest.fail("packed again"))
        assert pack(DATA, tmp_path)[0].digest == first.digest
    changed = {"numbers": DATA["numbers"] | {"count": 9}}
    assert pack(changed, tmp_path)[0].digest != first.digest


def test_packed_text_that_is_damaged_is_named_and_packed_again(tmp_path: Path) -> None:
    first = pack(DATA, tmp_path)[0]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["SHA256SUMS", "facts.json", "tokens.bin"]
    for file in files:
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 16
        for damaged in (bytes(flipped), whole[:-4], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.warns(UserWarning, match=rf"data\.numbers in {folder} is damaged \(.+\)"):
                again = pack(DATA, tmp_path)[0]
            assert again.digest == first.digest and again.stream.tolist() == first.stream.tolist()
            assert file.read_bytes() == whole
    pack(DATA, tmp_path)  # and nothing is said


def test_packing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("json.dumps", lambda *_, **__: pytest.fail("no"))
        with pytest.raises(BaseException, match="no"):
            pack(DATA, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_special_tokens_spelled_out_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    (text,) = pack({"a": str(tmp_path / "a.txt")}, tmp_path / "cache")
    assert text.stream.tolist().count(EOS) == 1


@pytest.mark.parametrize("data", [{}, {"numbers": DATA["numbers"] | {"count": 0}}])
def test_no_text_is_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match=r"data is empty|no text to train on"):
        pack(data, tmp_path)


# --- order ------------------------------------------------------------------------------------


def source(name: str, windows: int) -> Windows:
    text = PackedText(name, np.arange(4 * windows, dtype=np.int32), EOS, 1, 0, "")
    return Windows(text, 4)


@dataclass(frozen=True)
class Endless:
    """A source of which nothing but its length is asked."""

    name: str
    digest: str = ""

    def __len__(self) -> int:
        return 10**12 // 4096

    def example(self, index: int, number: int) -> dict[str, Any]:
        raise AssertionError

    def to_json(self) -> dict[str, Any]:
        raise AssertionError


def order(*sizes: int, mixture: list[float] | None = None, seed: int = 0) -> ExampleOrder:
    texts = [source(f"s{i}", size) for i, size in enumerate(sizes)]
    weights = None if mixture is None else {f"s{i}": w for i, w in enumerate(mixture)}
    return ExampleOrder(texts, weights, seed)


def test_each_pass_takes_every_window_once_in_another_order() -> None:
    windows = order(7, 5)
    passes = [[windows.place(i) for i in range(12 * p, 12 * (p + 1))] for p in range(3)]
    everything = [(0, i) for i in range(7)] + [(1, i) for i in range(5)]
    assert all(sorted(places) == everything for places in passes)
    assert passes[0] != passes[1] != passes[2]


def test_the_order_depends_on_the_seed_and_nothing_else() -> None:
    def places(seed: int) -> list[tuple[int, int]]:
        return [order(50, 50, seed=seed).place(i) for i in range(100)]

    assert places(3) == places(3)
    assert places(3) != places(4)


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert ORDER_VERSION == 2, "another order needs another version"
    assert [order(6).place(i)[1] for i in range(12)] == [5, 2, 3, 0, 1, 4, 3, 0, 4, 2, 1, 5]
    found = permuted([0, 1, 10**11], 10**12, 7)
    assert found.tolist() == [489110675061, 675952673949, 538304476972]


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000, 1024, 2049])
def test_an_order_has_every_number_once(size: int) -> None:
    orders = {tuple(permuted(range(size), size, key).tolist()) for key in range(9)}
    assert all(sorted(found) == list(range(size)) for found in orders)
    assert len(orders) > 1 or size == 1
    windows = order(size)  # block by block
    assert sorted(windows.place(i)[1] for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [5, 40, 65])  # 65 takes an odd number of bits
def test_every_number_is_as_likely_at_every_place(size: int) -> None:
    draws = 400
    found = np.array([permuted(range(size), size, key) for key in range(draws)])
    counts = np.stack([np.bincount(column, minlength=size) for column in found.T])
    expected, freedom = draws / size, (size - 1) ** 2
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - freedom) < 4 * (2 * freedom) ** 0.5


def test_an_order_of_a_trillion_tokens_needs_no_memory() -> None:
    windows = ExampleOrder([Endless("web")], None, 0)
    tracemalloc.start()
    places = [windows.place(10**8 + i)[1] for i in range(100)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert len(set(places)) == 100 and max(places) > 10**8


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [8, 1, 1], [1, 1, 1]])
def test_a_mixture_has_its_shares_at_every_moment(weights: list[float]) -> None:
    windows = order(11, 7, 5, mixture=weights)
    places = [windows.place(i) for i in range(2000)]
    for end in (10, 100, 999, 2000):
        counts = Counter(source for source, _ in places[:end])
        for index, weight in enumerate(weights):
            assert counts[index] == pytest.approx(end * weight / sum(weights), abs=1.5)
    for index, size in enumerate((11, 7, 5)):
        taken = [window for source, window in places if source == index]
        for start in range(0, len(taken) - size, size):  # each pass takes each window once
            assert sorted(taken[start : start + size]) == list(range(size))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"s0": 1.0}, "no weight for s1"),
        ({"s0": 1.0, "s1": 1.0, "s3": 1.0}, "'s3'.*Did you mean 's"),
        ({"s0": 1.0, "s1": 1e-6}, r"mixture\.s1.*1/1000"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, float], words: str) -> None:
    with pytest.raises(UpcyclingError, match=words):
        ExampleOrder([source("s0", 3), source("s1", 3)], weights, 0)


def test_devices_share_the_windows_of_a_step_whatever_their_number() -> None:
    def steps(world: int, first: int) -> list[list[int]]:
        ranks = [list(StepSampler(lambda: first, 5, 4, rank, world)) for rank in range(world)]
        return [[n for rank in ranks for n in rank[step]] for step in range(5 - first)]

    assert steps(1, 0) == steps(2, 0) == steps(4, 0) == np.arange(20).reshape(5, 4).tolist()
    assert steps(2, 3) == steps(1, 0)[3:]
