"""What strangers' files may not do: one kind of harm each. `tests/test_fuzz.py` has thousands."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import dense_folder, edit_config, edit_tensors, files_of
from tokenizers import Tokenizer

from fusion_upcycle import upcycle
from fusion_upcycle.checkpoint.adapter_config import read_adapter_config
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.source import check_companions, read_config
from fusion_upcycle.checkpoint.tokenizer_file import check_tokenizer, ends, tokenizing
from fusion_upcycle.checks import is_number
from fusion_upcycle.comparison.results import read_results
from fusion_upcycle.comparison.rows import find_tasks, make_rows
from fusion_upcycle.comparison.tables import make_tables
from fusion_upcycle.conversion.inherited import inherited
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError, plain, plain_logger
from fusion_upcycle.merging.companions import agree_on_companions
from fusion_upcycle.merging.vocabularies import read_formats
from fusion_upcycle.report.tables import Table
from fusion_upcycle.texts.tokens import read_tokenizer
from fusion_upcycle.untrusted import read_bytes, read_json
from fusion_upcycle.verify import verify, verify_files

# --- what is shown --------------------------------------------------------------------------------

HIDDEN = "\x1b[31mred\x08\u202eabc\u200b\ud800\r"


@pytest.mark.parametrize("character", [*HIDDEN[:1], "\x9b", "\u202e", "\u2066", "\ud800", "\r"])
def test_what_a_terminal_obeys_or_nobody_sees_is_written_out(character: str) -> None:
    shown = plain(f"a{character}b")
    assert shown == f"a{character.encode('unicode_escape').decode()}b"
    assert plain("é漢字 \u00a0\t\n🙂") == "é漢字 \u00a0\t\n🙂"


def test_a_message_of_megabytes_keeps_its_beginning_and_its_remedy() -> None:
    shown = str(UpcyclingError(f"a.safetensors has {'x' * 10**6}. Download it again."))
    assert len(shown) < 5000
    assert shown.startswith("a.safetensors") and shown.endswith("Download it again.")


def test_names_in_files_reach_errors_warnings_and_tables_without_escapes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = json.dumps({f"w{HIDDEN}": {"dtype": "I4", "shape": [1], "data_offsets": [0, 1]}})
    data = len(header).to_bytes(8, "little") + header.encode() + b"\0"
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UpcyclingError, match=r"tensor w\\x1b\[31mred") as refused:
        CheckpointReader(tmp_path)
    assert str(refused.value).isprintable()
    plain_logger("fusion_upcycle.x").warning("A field %s.", HIDDEN)
    assert caplog.messages[-1].isprintable()
    table = Table("t", ["name", "n"], [[f"[red]{HIDDEN}|", "1"]])
    assert table.to_markdown().splitlines()[-1].isprintable()
    assert [str(cell) for cell in table.to_rich().columns[0].cells] == [f"[red]{plain(HIDDEN)}|"]


# --- files that are none --------------------------------------------------------------------------

NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a pipe": (lambda path: os.mkfifo(path), "is a named pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "an endless one": (
        lambda path: path.symlink_to("/proc/kcore"),
        "has .* bytes: more than|cannot",
    ),
    "a loop of links": (lambda path: path.symlink_to(path), "cannot be read: Too many levels"),
    "nothing": (lambda path: None, "cannot be read: No such file"),
    "a large one": (
        lambda path: (path.touch(), os.truncate(path, 2**40)),
        "1,099,511,627,776 bytes",
    ),
}


@pytest.mark.parametrize(("make", "match"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_of_a_model_is_refused_at_once(
    make: Callable[[Path], object], match: str, tmp_path: Path
) -> None:
    make(path := tmp_path / "config.json")
    with pytest.raises(UpcyclingError, match=match):
        read_json(path)


def test_a_name_too_long_or_with_a_nul_is_refused(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(UpcyclingError):
            read_bytes(tmp_path / name)


def test_a_header_beyond_any_model_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((40 * 2**20).to_bytes(8, "little"))
    os.truncate(path, 50 * 2**20)
    with pytest.raises(UpcyclingError, match="header of 41,943,040 bytes, more than"):
        CheckpointReader(tmp_path)


# --- configs --------------------------------------------------------------------------------------


def dense(folder: Path, **fields: Any) -> Path:
    """A tiny Llama with such a config."""
    dense_folder(folder)
    edit_config(folder, **fields)
    return folder


TEXT = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2}
BOMBS: list[tuple[dict[str, Any], str]] = [
    ({"text_config": {**TEXT, "num_hidden_layers": 513}}, "num_hidden_layers=513"),
    ({"vision_config": {"depth": 10**5}}, "vision_config.depth=100000"),
    ({"vision_config": {"image_size": [10**6, 1]}}, "image_size=1000000"),
    ({"num_hidden_layers": 500, "num_experts": 4000}, "4000 experts in 500 layers"),
    (
        {"architectures": ["LlamaForSequenceClassification"], "num_labels": 10**6},
        "num_labels=1000000",
    ),
    ({"model_type": "xglm", "max_position_embeddings": 10**6}, "max_position_embeddings=1000000"),
    ({"model_type": "gptj", "n_positions": 10**5, "rotary_dim": 1024}, "rotary_dim=1024"),
    ({"rope_parameters": {"factor": 10**400}}, "factor=1000000"),
    ({"max_position_embeddings": -5}, "max_position_embeddings=-5"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings=1000000000000"),
    ({"text_config": {"rms_norm_eps": float("nan")}}, "text_config.rms_norm_eps=nan"),
]


@pytest.mark.parametrize(("fields", "match"), BOMBS, ids=[match for _, match in BOMBS])
def test_a_config_that_would_be_built_for_ever_is_refused(
    fields: dict[str, Any], match: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | fields))
    with pytest.raises(UpcyclingError, match=match):
        read_config(tmp_path)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_no_part_of_a_config_names_code(part: str, tmp_path: Path) -> None:
    said = {part: {"_attn_implementation": "x/y", "experts_implementation": "x/y"}}
    said["layers"] = [{"attn_implementation": "x/y"}]  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"} | said))
    assert "x/y" not in str(read_config(tmp_path).to_dict())


# --- tokenizers -----------------------------------------------------------------------------------


def replace(content: str, *, of: str = "String", pattern: str = "a") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {of: pattern}, "content": content}


def sequence(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(rules)}


def template(count: int) -> dict[str, Any]:
    """As many tokens around a text."""
    ids = {"x": {"id": "x", "ids": [0] * (count // 10), "tokens": ["x"] * (count // 10)}}
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}] * 10
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": ids}


TOKENIZER_BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": ({"normalizer": sequence(*[replace("aa")] * 16)}, "times as long"),
    "empty matches": (
        {"normalizer": replace("b" * 2000, of="Regex", pattern="x*")},
        "times as long",
    ),
    "prepended": ({"normalizer": {"type": "Prepend", "prepend": "a" * 2000}}, "times as long"),
    "decoder": ({"decoder": {"type": "Sequence", "decoders": [replace("aa")] * 16}}, "times as"),
    "expression": ({"normalizer": replace("", of="Regex", pattern="(a+)+$")}, "take for ever"),
    "template": ({"post_processor": template(10_000)}, "10,000 tokens around"),
    "charsmap": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA" * 5 + "YWFh" * 999}},
        "times as long",
    ),
    "long words": ({"model": {"max_input_chars_per_word": 10**9}}, "max_input_chars_per_word"),
}


@pytest.mark.parametrize(("rules", "match"), TOKENIZER_BOMBS.values(), ids=TOKENIZER_BOMBS)
def test_a_tokenizer_that_takes_all_memory_or_time_is_refused(
    rules: dict[str, Any], match: str, tmp_path: Path
) -> None:
    source = dense(tmp_path / "dense")
    byte_tokenizer(64).save_pretrained(source)
    file = source / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | rules))
    with pytest.raises(UpcyclingError, match=match):
        read_tokenizer(file)
    with pytest.raises(UpcyclingError, match=match):
        upcycle(source, tmp_path / "moe", progress=False)
    assert not (tmp_path / "moe").exists()


def test_expressions_of_published_tokenizers_end() -> None:
    llama = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for pattern in (llama, r"\d{1,3}(?=(?:\d{3})*\b)", r" ?[^(\s|[.,!?…])]+", r"[\p{L}\)+*]+\)"):
        assert ends(pattern), pattern
    for pattern in ("(a*)*", "(a|aa)+$", "((a+)b)*", "(?:x{1,9}){2,}", "a" * 5000):
        assert not ends(pattern), pattern


def test_a_tokenizer_fills_nothing_up_and_cuts_nothing_off(tmp_path: Path) -> None:
    byte_tokenizer(64).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_padding(length=2**30)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(file))
    assert len(read_tokenizer(file).encode("four").ids) == 4


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path: Path) -> None:
    class PanicException(BaseException):
        """As pyo3's: no `Exception`."""

    with (
        pytest.raises(UpcyclingError, match=r"t\.json cannot be used: index out"),
        tokenizing("t.json"),
    ):
        raise PanicException("index out of bounds")
    for ending in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ending), tokenizing("t.json"):
            raise ending


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b"\x08" + b"\xff" * 10**5),  # a number of 700,000 bits
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\x0f"),  # a piece of 4 GB
        ("vocab.txt", b"\xff"),
        ("tekken.json", b"[]"),
        (
            "tekken.json",
            b'{"config": {"default_vocab_size": "x", "default_num_special_tokens": 1}}',
        ),
        ("qwen.tiktoken", b"YQ== 1e5"),
        ("tokenizer.json", b"[" * 10**5),
    ],
)
def test_a_tokenizer_of_any_format_is_read_or_refused(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    (read,) = read_formats(tmp_path).values()
    with pytest.raises(UpcyclingError, match=name):
        read()


# --- templates, cards, records, scores ------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "said", "match"),
    [
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "../../../x", "template": "t"}]},
            r"chat template '\.\./\.\./\.\./x'.*no name of a file",
        ),
        ("tokenizer_config.json", {"chat_template": [["default"]]}, "damaged chat template"),
        ("chat_template.json", {"chat_template": "\ud800"}, "chat template"),
        ("chat_template.json", {"chat_template": 5}, "chat template"),
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id=.* is no token id"),
        ("generation_config.json", {"eos_token_id": 1.5}, "eos_token_id=1.5 is no token id"),
    ],
)
def test_templates_and_stop_tokens_are_what_they_are_called(
    file: str, said: dict[str, Any], match: str, tmp_path: Path
) -> None:
    """A template's name becomes that of a file: it led out of the output's folder."""
    (main := tmp_path / "main").mkdir()
    dense(other := tmp_path / "other")
    (other / file).write_text(json.dumps(said))
    config = read_config(other)
    with pytest.raises(UpcyclingError, match=match):
        agree_on_companions(
            {"main": main, "other": other}, dict.fromkeys(("main", "other"), config), "main", {}
        )


def test_a_card_of_references_is_not_unfolded(tmp_path: Path) -> None:
    """Nine lines of YAML make 10^9 fields."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)]
    card = "---\nlicense: mit\n" + "\n".join(lines) + "\n---\n"
    (tmp_path / "README.md").write_text(card)
    found = inherited({"a": tmp_path})
    assert "license" not in found and "references" in found["notes"][0]


@pytest.mark.parametrize("said", [{"files": 5}, {"files": [1]}, {"files": None, "options": 3}, []])
def test_a_record_of_the_wrong_kinds_is_refused(said: Any, tmp_path: Path) -> None:
    (tmp_path / "upcycling.json").write_text(json.dumps(said))
    with pytest.raises(UpcyclingError, match=r"upcycling\.json cannot be used"):
        verify(tmp_path, progress=False)
    if "options" not in said:
        with pytest.raises(UpcyclingError, match=r"upcycling\.json cannot be used"):
            verify_files(tmp_path, progress=False)


def test_a_rank_or_scale_beyond_numbers_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    for alpha in (10**400, float("inf"), float("nan"), 1e30):
        said = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha}
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))
        with pytest.raises(UpcyclingError, match=r"lora_alpha=.* is not a number"):
            read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"benchmark": {"purpose": "test", "row": 5}},
        {"benchmark": {"purpose": "test", "report": 5}},
        {"benchmark": {}},
        {"tasks": {"a": {"accuracy": 10**400}}},
    ],
)
def test_a_report_is_made_of_results_only(said: Any, tmp_path: Path) -> None:
    (tmp_path / "run_record.json").write_text(json.dumps(said))
    with pytest.raises(UpcyclingError, match=r"run_record\.json|too large"):
        read_results([tmp_path])


BENCHMARK = {
    "purpose": "test",
    "experiment": "e",
    "row": "a",
    "settings": {},
    "position": 1,
    "group": "g",
    "reference": None,
    "models": ["a"],
    "subset": False,
    "seed": 0,
    "trials": 0,
    "tasks": {},
    "error": None,
    "arguments": [],
    "costs": {"wall_seconds": 1.5},
    "report": {"pool": {"a": {"accuracy": 0.5}, "cost": {"total_parameters": 1}}},
}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"models": [["a"]]}, "models is"),
        ({"tasks": {"pool": ["a"]}}, "tasks is"),
        ({"tasks": {"pool": {"unseen": float("nan")}}}, "tasks is"),
        ({"costs": {"wall_seconds": "../../x"}}, "seconds is"),
        ({"report": {"pool": {"a": {"accuracy": 0.5}, "cost": {"total_parameters": [1]}}}}, "cost"),
    ],
)
def test_a_table_is_made_of_numbers_and_names(said: Any, words: str, tmp_path: Path) -> None:
    def tables(section: dict[str, Any]) -> object:
        (tmp_path / "run_record.json").write_text(json.dumps({"benchmark": section}))
        results = read_results([tmp_path])
        tasks = find_tasks(results)
        return make_tables(make_rows(results, tasks), tasks)

    assert tables(BENCHMARK)
    with pytest.raises(UpcyclingError, match=f"run_record.json.*{words}"):
        tables(BENCHMARK | said)


@pytest.mark.parametrize("value", [2**63, -(10**400), float("inf"), "1", True])
def test_a_number_is_finite_and_fits(value: object) -> None:
    assert not is_number(value)
    assert is_number(2**63 - 1) and is_number(0.5)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_found_wherever_it_is(value: float, tmp_path: Path) -> None:
    source = dense(tmp_path / "dense")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][-1, -1] = value  # of a token that no sample has

    byte_tokenizer(64).save_pretrained(source)
    edit_config(source, vocab_size=300)
    edit_tensors(source, lambda tensors: widen(tensors, 300))
    edit_tensors(source, damage)
    before = files_of(tmp_path)
    with pytest.raises(
        UpcyclingError, match=r"model\.embed_tokens\.weight of the result has a value"
    ):
        upcycle(source, tmp_path / "moe", progress=False)
    assert files_of(tmp_path) == before
    assert upcycle(source, tmp_path / "moe", verify="none", progress=False).proof.mode == "none"


def test_what_transformers_makes_of_a_forged_generation_config_is_ours(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    (source / "generation_config.json").write_text('{"pad_token_id": [7, 7]}')
    with pytest.raises(UpcyclingError, match=r"cannot load .*TypeError"):
        upcycle(source, tmp_path / "moe", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def widen(tensors: dict[str, torch.Tensor], rows: int) -> None:
    """More tokens than the tokenizer has."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            old = tensors[name]
            tensors[name] = torch.zeros(rows, old.shape[1], dtype=old.dtype)
            tensors[name][: len(old)] = old


def test_companions_that_are_no_files_are_left_and_damaged_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").mkdir()
    os.mkfifo(tmp_path / "tokenizer.model")
    check_companions(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(UpcyclingError, match=r"tokenizer_config\.json is damaged"):
        check_companions(tmp_path)


def test_the_check_of_a_tokenizer_sees_a_new_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    check_tokenizer(file)
    file.write_text(json.dumps({"normalizer": sequence(*[replace("aa")] * 16)}))
    with pytest.raises(UpcyclingError, match="times as long"):
        check_tokenizer(file)
