"""The command line: what it prints, what it leaves, and its exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_bits, dense_folder, edit_config, files_of, tensors_of

from fusion_upcycle import upcycle
from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.cli import main
from fusion_upcycle.cli.option_flags import Command
from fusion_upcycle.cli.planning_flags import add_planning, planning_options
from fusion_upcycle.inspection.recipes import RECIPES, recipe_options
from fusion_upcycle.options import names
from fusion_upcycle.upcycling.options import UpcyclingOptions, make_options

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


@pytest.mark.parametrize(("command", "policy"), [("verify", "PASSIVE"), ("train", None)])
def test_threads_of_a_conversion_sleep_when_they_wait(
    command: str, policy: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    given = [command, str(tmp_path / "none")]
    with pytest.raises(SystemExit):
        main(
            [*given, str(tmp_path / "out"), "--demo", "--tokens", "64"] if policy is None else given
        )
    assert os.environ.get("OMP_WAIT_POLICY") == policy


# --- planning options ---------------------------------------------------------------------------


def planning_parser() -> Command:
    parser = Command()
    add_planning(parser)
    return parser


def planned(*arguments: str) -> dict[str, Any]:
    return planning_options(planning_parser().parse_args(arguments))


def test_every_planning_option_has_a_flag_and_every_default_one_home() -> None:
    parser = planning_parser()
    assert planning_options(parser.parse_args([])) == {}
    dests = {action.dest for action in parser._actions} - {"help", "recipe"}
    assert dests == set(names(UpcyclingOptions))


def test_help_lists_all_targets_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails("upcycle", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in (*ARCHITECTURES, *RECIPES):
        assert name in text.replace("- ", "-")


def test_planning_flags_are_understood() -> None:
    shards = ["--num-experts", "64", "--experts-per-token", "8", "--granularity", "8"]
    shared = ["--shared-expert", "copy", "--shared-expert-intermediate-size", "80"]
    assert planned(*shards, *shared, "--expert-intermediate-size", "6") == {
        "num_experts": 64,
        "experts_per_token": 8,
        "granularity": 8,
        "shared_expert": "copy",
        "shared_expert_intermediate_size": 80,
        "expert_intermediate_size": 6,
    }
    assert planned("--no-normalize-topk-prob") == {"normalize_topk_prob": False}
    assert planned("--normalize-topk-prob") == {"normalize_topk_prob": True}
    assert planned("--moe-layers", "0,2,11") == {"moe_layers": [0, 2, 11]}
    assert planned("--moe-layers", "last_2") == {"moe_layers": "last_2"}
    assert planned("--target", "glm4_moe") == {"target": "glm4_moe"}


def test_a_recipe_is_a_start_that_flags_replace() -> None:
    flags = ["--num-experts", "32", "--expert-init", "copy", "--no-normalize-topk-prob"]
    replaced = {"num_experts": 32, "expert_init": "copy", "normalize_topk_prob": False}
    for given, expected in (([], {}), (flags, replaced)):
        found = make_options(**planned("--recipe", "qwen2_57b_a14b", *given))
        wanted = make_options(**recipe_options("qwen2_57b_a14b") | expected)
        assert found.to_json() == wanted.to_json()


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
    edit_config(source, rope_thetta=5.0)  # nearly a field that counts
    arguments = ["upcycle", str(source), str(tmp_path / "out"), "--quiet"]
    assert fails(*arguments) == 2
    main([*arguments, "--ignore-config-fields", "rope_thetta"])


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
        (["--router-init", "normal,std=0"], "--router-init zeros"),
        (["--dtype", "bf16"], "Did you mean 'bfloat16'"),
        (["--verify", "logit"], "Did you mean 'logits'"),
        (["--max-shard-size", "big"], "max_shard_size='big'"),
        (["--recipe", "mixtral"], "Did you mean 'mixtral_8x7b'"),
        (["--moe-layers", "0,2,"], "moe_layers='0,2,'"),
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


def test_upcycle_follows_a_recipe(source: Path, tmp_path: Path) -> None:
    main(["upcycle", str(source), str(tmp_path / "out"), "--quiet", "--recipe", "skywork_moe"])
    options = json.loads((tmp_path / "out" / "upcycling.json").read_text())["options"]
    assert (options["target"], options["num_experts"]) == ("mixtral", 16)


def test_options_before_the_folders_are_understood(source: Path, tmp_path: Path) -> None:
    main(["upcycle", "--quiet", "--expert-init", "noise", str(source), str(tmp_path / "out")])
    assert (tmp_path / "out" / "upcycling.json").is_file()


@pytest.mark.parametrize("place", ["nowhere/at/all", "./nowhere"])
def test_a_missing_source_is_named_with_exit_2(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails("upcycle", place, tmp_path / "out") == 2
    assert f"{Path(place).name} does not exist" in capsys.readouterr().err


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


@pytest.mark.parametrize(("experts_per_token", "said"), [(1, True), (2, False)])
def test_inspect_says_that_renormalised_top_1_teaches_the_router_nothing(
    experts_per_token: int, said: bool, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(source), "--experts-per-token", str(experts_per_token)])
    out = " ".join(capsys.readouterr().out.split())
    assert ("the language model's loss teaches the router nothing" in out) == said


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
    assert fails("inspect", source, "--target", "mixtral") == 2
    assert "attention_bias" in capsys.readouterr().err


def test_inspect_needs_no_weights_for_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "--recipe", "mixtral_8x7b"])
    out = capsys.readouterr().out
    for shown in ("mistral_7b", "7,241,732,096", "46,702,792,704", "12,879,925,248"):
        assert shown in out
    assert "Published: 46.7B total, 12.9B active" in out


def test_inspect_says_what_training_costs_in_rows_of_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["inspect", "--recipe", "mixtral_8x7b", "--tokens", "1.5T", "--context-length", "8192"])
    out = capsys.readouterr().out
    assert "training on 1.500T tokens in sequences of 8192" in out
    rows = {
        cells[0]: cells[1:]
        for line in out.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│").split("│")]) == 7
    }
    # by hand: 2 x (parameters - 32000 x 4096), and 32 layers of 32 heads of width 128, which
    # attend to 3072.25 positions on the mean (window 4096)
    scores = 32 * 2 * 32 * 2 * 128 * (4096 - 4096 * 4095 / (2 * 8192))
    dense, moe = (2 * (n - 131072000) + scores for n in (7241732096, 12879925248))
    assert rows["dense"] == (
        ["7.242B", "7.242B", "14.48GB", f"{dense:.2e}", f"{3 * dense * 1.5e12:.2e}", "1.00"]
    )
    cost = [f"{moe:.2e}", f"{3 * moe * 1.5e12:.2e}", f"{moe / dense:.2f}"]
    assert rows["upcycled"] == rows["fresh MoE"] == ["46.70B", "12.88B", "93.41GB", *cost]
    assert rows["wider dense"] == ["12.88B", "12.88B", "25.76GB", *cost]
    assert "arXiv 2212.05055" in out


def test_inspect_plans_a_recipe_for_another_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense_folder(tmp_path / "dense", intermediate_size=64)
    main(["inspect", str(source), "--recipe", "nemotron_e8g8t8", "--seed", "9"])
    out = capsys.readouterr().out
    assert "64 experts" in out
    assert "8 per expert" in out  # an eighth of 64 neurons
    assert "seed 9" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "mixtral8x7"], "Did you mean 'mixtral_8x7b'"),
        (["--recipe", "mixtral_8x7b", "--tokens", "many"], "--tokens many"),
        (["--recipe", "mixtral_8x7b", "--tokens", "0B"], "--tokens 0B"),
        (["--recipe", "mixtral_8x7b", "--context-length", "0"], "context_length=0"),
        (["--recipe", "minicpm_moe", "--target", "mixtral"], "granite"),
    ],
    ids=str,
)
def test_inspect_names_what_is_wrong_with_a_recipe(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails("inspect", *arguments) == 2
    assert message in capsys.readouterr().err


def test_inspect_without_source_and_recipe_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails("inspect") == 2
    assert "a SOURCE, a --recipe, or both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "claim"),
    [
        ([], "exact, up to rounding"),
        (["--expert-init", "noise"], "the initialiser changes weights"),
        (["--granularity", "2", "--router-init", "zeros"], "these shards and this routing"),
    ],
    ids=str,
)
def test_inspect_says_whether_the_function_is_kept(
    options: list[str], claim: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(source), *options])
    assert claim in " ".join(capsys.readouterr().out.split())


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


@pytest.mark.parametrize("flag", ["--num_experts=2", "--num_experts 2"])
def test_a_flag_may_be_spelled_as_in_python(flag: str, source: Path, tmp_path: Path) -> None:
    main(["upcycle", str(source), str(tmp_path / "out"), *flag.split(), "--verify=none", "--quiet"])
    assert json.loads((tmp_path / "out/config.json").read_text())["num_local_experts"] == 2


def test_an_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails("upcycle", "a", "b", "--num-exprets", "2") == 2
    assert "--num-exprets: did you mean --num-experts?" in capsys.readouterr().err


def test_the_help_lists_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails("--help") == 0
    said = capsys.readouterr().out
    for command in ("inspect", "upcycle", "merge", "expand", "train", "verify", "analyze"):
        assert len(re.findall(rf"^ +{command}\b|fusion_upcycle {command}\b", said, re.M)) == 1


def test_lists_are_read_with_brackets_too(source: Path, tmp_path: Path) -> None:
    edit_config(source, auto_map={"AutoConfig": "configuration_x.XConfig"}, rope_thetta=2.0)
    run = ["upcycle", str(source), str(tmp_path / "out"), "--verify=none", "--quiet"]
    main([*run, "--ignore-config-fields", "[auto_map, rope_thetta]"])
    assert (tmp_path / "out" / "config.json").is_file()
