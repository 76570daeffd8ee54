"""The command line: what it prints, what it leaves, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import assert_same_bits, dense_folder, edit_config, files_of, tensors_of

from fusion_upcycle import upcycle
from fusion_upcycle.cli import main

QUICK_HELP = """
import sys
from fusion_upcycle.cli import main
try:
    main(["--help"])
except SystemExit as exit_:
    assert exit_.code == 0
heavy = {"torch", "transformers", "lightning", "fusion_bench", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""


def fails(*arguments: object) -> int:
    """Run a command that must exit by itself; its status."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama."""
    return dense_folder(tmp_path / "dense")


def test_help_needs_no_heavy_import() -> None:
    result = subprocess.run(
        [sys.executable, "-c", QUICK_HELP], check=True, capture_output=True, text=True
    )
    for command in ("inspect", "upcycle", "verify", "examples:"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["inspect", "upcycle", "verify"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(command, "--help") == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["upcicle"], ["upcycle"], ["upcycle", "a"], ["inspect"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(*arguments) == 2
    assert "usage:" in capsys.readouterr().err


def test_the_module_is_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusion_upcycle", "verify", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


# --- upcycle ----------------------------------------------------------------------------------


def test_upcycle_makes_the_folder_that_the_function_makes(source: Path, tmp_path: Path) -> None:
    options = ["--num-experts", "3", "--experts-per-token", "1", "--seed", "5"]
    inits = ["--expert-init", "drop,drop_ratio=0.25,paired=false", "--router-init", "zeros"]
    main(["upcycle", str(source), str(tmp_path / "out"), *options, *inits, "--quiet"])
    upcycle(
        source,
        tmp_path / "function",
        num_experts=3,
        experts_per_token=1,
        seed=5,
        expert_init={"name": "drop", "drop_ratio": 0.25, "paired": False},
        router_init="zeros",
        progress=False,
    )
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "function"))


def test_upcycle_says_what_was_proven_counted_and_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["upcycle", str(source), str(tmp_path / "out"), "--quiet"])
    out = capsys.readouterr().out
    assert "exact, proven" in out
    assert "active per token" in out
    assert f"Output: {tmp_path / 'out'}" in out


def test_upcycle_quiet_prints_no_progress(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["upcycle", str(source), str(tmp_path / "out"), "--quiet"])
    assert "%|" not in capfd.readouterr().err


def test_upcycle_casts_and_shards(source: Path, tmp_path: Path) -> None:
    sizes = ["--dtype", "bfloat16", "--max-shard-size", "20KB"]
    main(["upcycle", str(source), str(tmp_path / "out"), *sizes, "--quiet"])
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_upcycle_accepts_fields_declared_without_effect(source: Path, tmp_path: Path) -> None:
    edit_config(source, note="x")
    arguments = ["upcycle", str(source), str(tmp_path / "out"), "--quiet"]
    assert fails(*arguments) == 2
    main([*arguments, "--ignore-config-fields", "note"])


def test_upcycle_overwrites_only_when_told(source: Path, tmp_path: Path) -> None:
    arguments = ["upcycle", str(source), str(tmp_path / "out"), "--quiet", "--verify", "none"]
    main(arguments)
    assert fails(*arguments) == 2
    main([*arguments, "--seed", "3", "--overwrite"])
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    assert record["options"]["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-experts", "1"], "num_experts=1 must be 2"),
        (["--experts-per-token", "9"], "experts_per_token=9"),
        (["--expert-init", "nois"], "Did you mean 'noise'"),
        (["--expert-init", "noise,std=1"], "Did you mean 'noise_std'"),
        (["--expert-init", "noise,noise_std"], "'noise_std' is not OPTION=VALUE"),
        (["--expert-init", "noise,noise_std=much"], "'noise_std=much' is not OPTION=VALUE"),
        (["--expert-init", 'noise,noise_std="1"'], "noise_std"),
        (["--expert-init", "drop,drop_ratio=7"], "drop_ratio=7"),
        (["--router-init", "normal,std=0"], "router_init=zeros"),
        (["--dtype", "bf16"], "Did you mean 'bfloat16'"),
        (["--verify", "logit"], "Did you mean 'logits'"),
        (["--max-shard-size", "big"], "max_shard_size='big'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_with_exit_2_and_writes_nothing(
    arguments: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files_of(tmp_path)
    assert fails("upcycle", source, tmp_path / "out", "--quiet", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert files_of(tmp_path) == before


def test_options_before_the_folders_are_understood(source: Path, tmp_path: Path) -> None:
    main(["upcycle", "--quiet", "--expert-init", "noise", str(source), str(tmp_path / "out")])
    assert (tmp_path / "out" / "upcycling.json").is_file()


@pytest.mark.parametrize("place", ["nowhere/at/all", "./nowhere"])
def test_a_missing_source_is_named_with_exit_2(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails("upcycle", place, tmp_path / "out") == 2
    assert f"{place} does not exist" in capsys.readouterr().err


def test_an_unwritable_output_is_an_error_without_a_traceback(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails("upcycle", source, source / "config.json" / "out", "--quiet") == 2
    assert "config.json" in capsys.readouterr().err


def test_a_failed_proof_exits_with_1(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fusion_upcycle.verification.function.TOLERANCE", -1.0)
    assert fails("upcycle", source, tmp_path / "out", "--quiet") == 1
    assert "claims to be exact and is not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- inspect ----------------------------------------------------------------------------------


def test_inspect_shows_source_and_result(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(source), "--num-experts", "6", "--dtype", "bfloat16"])
    out = capsys.readouterr().out
    for shown in ("LlamaForCausalLM", "MixtralForCausalLM", "float32", "bfloat16", "6 experts"):
        assert shown in out


def test_inspect_counts_what_is_then_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(source)])
    out = capsys.readouterr().out
    record = upcycle(source, tmp_path / "out", progress=False).record
    for count in (*record["parameters"].values(), record["bytes"]):
        assert f"{count:,}" in out


def test_inspect_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    main(["inspect", str(source)])
    assert files_of(tmp_path) == before


def test_inspect_refuses_what_upcycle_refuses(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(source, attention_bias=True)
    assert fails("inspect", source) == 2
    assert "attention_bias" in capsys.readouterr().err


# --- verify -----------------------------------------------------------------------------------


def test_verify_proves_an_output_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["upcycle", str(source), str(tmp_path / "out"), "--quiet", "--verify", "none"])
    assert "unproven" in capsys.readouterr().out
    main(["verify", str(tmp_path / "out"), "--quiet"])
    assert "exact, proven" in capsys.readouterr().out


def test_verify_takes_a_moved_source(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["upcycle", str(source), str(tmp_path / "out"), "--quiet", "--verify", "none"])
    source.rename(tmp_path / "moved")
    assert fails("verify", tmp_path / "out", "--quiet") == 2
    main(["verify", str(tmp_path / "out"), "--source", str(tmp_path / "moved"), "--quiet"])
    assert "exact, proven" in capsys.readouterr().out


def test_verify_refuses_a_folder_of_others(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails("verify", source) == 2
    assert "not an output of ours" in capsys.readouterr().err


def test_verify_accepts_a_home_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["upcycle", "~/dense", "~/out", "--quiet", "--verify", "none"])
    assert (tmp_path / "out").is_dir()
    main(["verify", "~/out", "--quiet"])
