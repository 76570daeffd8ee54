"""The surfaces: every kind of file of a stranger that is read, and what reads it."""

import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing import valid
from fuzzing.mutation import as_lines, as_safetensors
from fuzzing.surfaces import File, Surface

from fusion_upcycle import upcycle
from fusion_upcycle.addition.run import read_merged
from fusion_upcycle.checkpoint.adapter_config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from fusion_upcycle.checkpoint.digests import SUMS_FILE
from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.moments import MOMENTS_FILE, read_moments
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import check_companions, read_config
from fusion_upcycle.checkpoint.staging import RECORD_FILE
from fusion_upcycle.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from fusion_upcycle.comparison.formats import to_csv, to_json, to_latex, to_markdown
from fusion_upcycle.comparison.results import read_results
from fusion_upcycle.comparison.rows import find_tasks, make_rows
from fusion_upcycle.comparison.tables import make_tables
from fusion_upcycle.conversion.adapted import open_model
from fusion_upcycle.conversion.inherited import inherited
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.importance.scores import SCORES_FILE, Importance
from fusion_upcycle.merging.companions import agree_on_companions
from fusion_upcycle.merging.statistics import STATISTICS_FOLDER, read_statistics
from fusion_upcycle.merging.tokenizers import compare_tokenizers
from fusion_upcycle.merging.vocabularies import read_formats
from fusion_upcycle.texts.documents import load_documents
from fusion_upcycle.training.run import upcycling_of
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_folder
from fusion_upcycle.verification.function import take_sample
from fusion_upcycle.verify import verify, verify_files

_SHARD = "model-00001-of-00001.safetensors"


@cache
def surfaces() -> tuple[Surface, ...]:
    """All of them; makes the valid files first, once."""
    models = valid.models()
    config = read_config(models / "dense")
    statistics = f"{STATISTICS_FOLDER}/moments.safetensors"
    return (
        Surface(
            "weights: header",
            [
                File(
                    SINGLE_FILE,
                    [valid.SMALL_HEADER, valid.header_of(models / "dense" / SINGLE_FILE)],
                    as_safetensors,
                )
            ],
            _read_tensors,
            199_000,
        ),
        Surface(
            "weights: index",
            [
                File(
                    INDEX_FILE,
                    [
                        {
                            "metadata": {"total_size": 32},
                            "weight_map": dict.fromkeys(("a", "b.weight", "c"), _SHARD),
                        }
                    ],
                ),
                File(_SHARD, [valid.SMALL_HEADER], as_safetensors),
            ],
            _read_tensors,
            40_000,
        ),
        Surface("config", [File("config.json", valid.configs())], read_config, 120_000),
        Surface(
            "config: planned",
            [File("config.json", [valid.read("dense/config.json")])],
            lambda folder: plan_folder(folder, make_options(num_experts=4)),
            3_000,
            _copy_of("dense"),
            patience=3,
        ),
        Surface(
            "whole: upcycle",
            [
                File(name, [valid.read(f"dense/{name}")])
                for name in (
                    "config.json",
                    "generation_config.json",
                    "tokenizer_config.json",
                    "tokenizer.json",
                )
            ],
            _upcycle,
            1_000,
            _copy_of("dense"),
            patience=3,
        ),
        Surface(
            "tokenizer.json",
            [File("tokenizer.json", valid.tokenizers())],
            lambda folder: (take_sample(folder / "tokenizer.json", config), _formats(folder)),
            80_000,
        ),
        Surface(
            "tokenizers: other formats",
            [
                File("vocab.json", [{"a": 0, "b": 1, "ab": 2}]),
                File("merges.txt", [b"#version: 0.2\na b\n"]),
                File("vocab.txt", [b"[UNK]\na\nb\n"]),
                File("tokenizer.model", [valid.sentencepiece()]),
                File("tekken.json", [valid.tekken()]),
                File("qwen.tiktoken", [b"YQ== 0\nYg== 1\n"]),
                File("added_tokens.json", [{"<x>": 7}]),
                File(
                    "tokenizer_config.json",
                    [{"added_tokens_decoder": {"7": {"content": "<x>"}}, "do_lower_case": True}],
                ),
            ],
            _formats,
            60_000,
        ),
        Surface(
            "tokenizers: compared",
            [
                File("tokenizer.json", [valid.read("dense/tokenizer.json")]),
                File("tokenizer_config.json", [valid.read("dense/tokenizer_config.json")]),
            ],
            lambda folder: compare_tokenizers({"a": models / "other", "b": folder}, "a"),
            20_000,
        ),
        Surface(
            "templates, generation",
            [
                File(
                    "tokenizer_config.json",
                    [
                        {
                            "chat_template": [
                                {"name": "default", "template": "{{ x }}"},
                                {"name": "rag", "template": "y"},
                            ],
                            "eos_token": "a",
                        }
                    ],
                ),
                File(
                    "chat_template.json",
                    [{"chat_template": "{% for m in messages %}{{ m }}{% endfor %}"}],
                ),
                File("chat_template.jinja", [b"{{ messages }}"]),
                File(
                    "generation_config.json",
                    [{"eos_token_id": [1, 2], "temperature": 0.5, "do_sample": True}],
                ),
                File("preprocessor_config.json", [{"size": {"height": 16, "width": 16}}]),
            ],
            lambda folder: _companions(folder, models / "plain", config),
            20_000,
            lambda folder: (models / "plain").mkdir(exist_ok=True),
        ),
        Surface(
            "record",
            [File(RECORD_FILE, [_older(name) for name in ("moe", "grown", "merged")])],
            lambda folder: _record(folder, models),
            60_000,
        ),
        Surface(
            "record: trained",
            [File(RECORD_FILE, [valid.read("moe/upcycling.json")])],
            lambda folder: upcycling_of(str(folder)),
            30_000,
        ),
        Surface(
            "digests",
            [
                File(SUMS_FILE, [_bytes("moe", SUMS_FILE)]),
                File(RECORD_FILE, [_bytes("moe", RECORD_FILE), valid.read("moe/upcycling.json")]),
            ],
            lambda folder: verify_files(folder, progress=False),
            40_000,
            _copy_of("moe"),
        ),
        Surface("scores", [File(SCORES_FILE, [valid.SCORES])], _scores, 60_000),
        Surface(
            "moments",
            [File(MOMENTS_FILE, [valid.moments(models)], as_safetensors)],
            read_moments,
            80_000,
            lambda folder: (folder / MOMENTS_FILE).parent.mkdir(),
        ),
        Surface(
            "adapter: config",
            [File(CONFIG_FILE, [valid.ADAPTER])],
            _adapter,
            60_000,
            lambda folder: shutil.copy(models / "adapter.safetensors", folder / WEIGHTS_FILE),
        ),
        Surface(
            "adapter: weights",
            [
                File(WEIGHTS_FILE, [valid.adapter_weights(models)], as_safetensors),
                File(
                    CONFIG_FILE,
                    [{**valid.ADAPTER, "rank_pattern": {}, "target_modules": ["up_proj"]}],
                ),
            ],
            lambda folder: open_model(Located(models / "dense", folder)),
            5_000,
            patience=3,
        ),
        Surface(
            "router statistics",
            [
                File(
                    statistics,
                    [_bytes("merged", statistics), valid.header_of(models / "merged" / statistics)],
                    as_safetensors,
                )
            ],
            _statistics,
            11_000,
            _copy_of("merged"),
        ),
        Surface(
            "card",
            [File("README.md", [valid.CARD])],
            lambda folder: inherited({"a": folder}),
            31_000,
        ),
        Surface(
            "results",
            [
                File("run_record.json", [valid.RUN]),
                File("results_1.json", [valid.LM_EVAL]),
                File("program_report.json", [valid.PROGRAM]),
            ],
            _results,
            20_000,
        ),
        Surface(
            "data",
            [
                File("data.jsonl", [[{"text": "a"}, {"text": "b", "x": 1}]], as_lines),
                File("text.txt", [b"some text\n"]),
            ],
            lambda folder: load_documents(
                [str(folder / "data.jsonl"), str(folder / "text.txt")], "data"
            ),
            60_000,
        ),
    )


def _read_tensors(folder: Path) -> None:
    reader = CheckpointReader(folder)
    for name in reader.specs:
        for piece in reader.chunks(name):
            piece.float().sum()
    reader.release(reader.specs)


def _copy_of(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(valid.models() / name, folder, dirs_exist_ok=True)


def _upcycle(folder: Path) -> None:
    output = folder / "output"
    try:
        upcycle(folder, output, num_experts=2, progress=False, max_shard_size="20KB")
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _formats(folder: Path) -> None:
    """Every format that is there, those that cannot be read too."""
    refused = None
    for read in read_formats(folder).values():
        try:
            read()
        except UpcyclingError as error:
            refused = error
    if refused is not None:
        raise refused


def _companions(folder: Path, main: Path, config: Any) -> None:
    made = folder / "made"
    check_companions(folder)
    for first in (main, folder):
        found = {"main": first, "other": folder}
        agreed = agree_on_companions(found, dict.fromkeys(found, config), "main", {})
        made.mkdir()
        try:
            agreed.put(made)
        finally:
            shutil.rmtree(made)


def _bytes(model: str, name: str) -> bytes:
    return (valid.models() / model / name).read_bytes()


def _older(name: str) -> Any:
    """A record as earlier versions wrote it, without digests: it is read without them."""
    record = valid.read(f"{name}/{RECORD_FILE}")
    del record["files"]
    return record


def _record(folder: Path, models: Path) -> None:
    with suppress(UpcyclingError):
        read_merged(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            verify(folder, models / "nothing", progress=False)
        except UpcyclingError as error:
            if "nothing does not exist" not in str(error):  # the last that is looked at
                raise


def _scores(folder: Path) -> None:
    scores = Importance.load(folder)
    for metric in scores.metrics:
        scores.scores(metric)
    scores.check(valid.SCORES["model"])


def _adapter(folder: Path) -> None:
    config = read_adapter_config(folder)
    for module in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        config.rank(module)
        config.scale(module)


def _statistics(folder: Path) -> None:
    merged = read_merged(folder)
    read_statistics(
        folder,
        layers=range(2),
        models=2,
        hidden_size=valid.read("dense/config.json")["hidden_size"],
        sha256=merged.record["statistics"]["sha256"],
    )


def _results(folder: Path) -> None:
    results = read_results([folder])
    tasks = find_tasks([result for result in results if result.error is None])
    tables = make_tables(make_rows(results, tasks), tasks)
    for table in tables:
        for form in (to_markdown, to_latex, to_csv):
            form(table).encode()
    to_json(tables, [result for result in results if result.error is not None]).encode()
