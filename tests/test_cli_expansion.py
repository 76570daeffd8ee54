"""The commands `importance` and `expand`."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from test_calibrated_expansion import TEXT, byte_moe
from test_cli import fails
from test_expansion_moments import flat, trained
from tiny import assert_same_bits, dense_folder, files_of, load, tensors_of

from fusion_upcycle import expand
from fusion_upcycle.checkpoint.moments import read_moments
from fusion_upcycle.cli import main
from fusion_upcycle.demo import DOMAINS, domain_text
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.expansion.options import ExpansionOptions
from fusion_upcycle.importance.scores import METRICS, Importance
from fusion_upcycle.texts.windows import calibration_sequences


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return byte_moe(tmp_path / "moe")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of two files."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "sums.txt").write_text(TEXT[: len(TEXT) // 2])
    (tmp_path / "texts" / "more.jsonl").write_text(json.dumps({"text": TEXT[len(TEXT) // 2 :]}))
    return tmp_path / "texts"


def size_flags(texts: Path) -> list[str]:
    return [f"--data=sums={texts}", "--tokens=1000", "--context-length=50", "--quiet"]


def test_importance_then_expand(
    source: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, output = tmp_path / "scores", tmp_path / "out"
    main(["importance", str(source), f"--output={scores}", *size_flags(texts)])
    shown = capsys.readouterr().out
    assert f"Output: {scores}" in shown
    assert "grad_squared" in shown and "layer 1" in shown
    importance = Importance.load(scores)
    assert importance.metrics.keys() == METRICS.keys()
    assert {path.name for path in scores.iterdir()} == {
        *("importance.json", "importance.png", "importance.svg")
    }
    flags = ["--num-experts=6", "--selection=greedy", "--metric=load", "--max-copies=2"]
    flags += ["--expert-init=noise,noise_std=0.02", "--router-extension=fit,steps=3", "--seed=5"]
    main(["expand", str(source), str(output), *flags, f"--scores={scores}", *size_flags(texts)])
    shown = capsys.readouterr().out
    assert "Least used copy, on the calibration text: " in shown
    assert f"Output: {output}" in shown
    options: dict[str, Any] = {
        "num_experts": 6,
        "selection": "greedy",
        "metric": "load",
        "max_copies": 2,
        "expert_init": {"name": "noise", "noise_std": 0.02},
        "router_extension": {"name": "fit", "steps": 3},
        "seed": 5,
    }
    calibration = {"sums": [str(texts / name) for name in ("more.jsonl", "sums.txt")]}
    expand(
        source,
        tmp_path / "function",
        scores=importance,
        calibration=calibration,
        calibration_tokens=1000,
        context_length=50,
        progress=False,
        **options,
    )
    assert_same_bits(tensors_of(output), tensors_of(tmp_path / "function"))
    main(["verify", str(output), "--quiet"])
    assert "only nearly" in capsys.readouterr().out


def test_scores_that_were_measured_are_announced(
    source: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    main(["expand", str(source), str(output), "--selection=greedy", *size_flags(texts)])
    shown = capsys.readouterr().out
    assert f"Importance: {output / 'importance'}" in shown
    assert "is what importance brings" in shown


def test_the_control_needs_no_scores(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    main(["expand", str(source), str(output), "--selection=control", "--num-experts=6", "--quiet"])
    assert "is what importance brings" not in capsys.readouterr().out
    record = json.loads((output / "upcycling.json").read_text())
    counts = {tuple(sorted(map(plan.count, range(4)))) for plan in record["plan"].values()}
    assert counts == {(1, 1, 1, 3)}


def test_demo_text_is_at_hand(source: Path, tmp_path: Path) -> None:
    flags = ["--demo", "--tokens=600", "--router-extension=split,mixed_share=0.2", "--quiet"]
    main(["expand", str(source), str(tmp_path / "out"), *flags])
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    texts = record["router"]["calibration"]["texts"]
    new_to_the_demo_models = calibration_sequences(
        {domain: domain_text(domain, "continued") for domain in DOMAINS},
        source / "tokenizer.json",
        tokens=600,
        context_length=texts["prose"]["context_length"],
    )
    assert texts == new_to_the_demo_models.to_json()["texts"]
    assert record["options"]["router_extension"]["mixed_share"] == 0.2


def test_moments_grow_too(tmp_path: Path) -> None:
    source = trained(tmp_path, "mixtral")
    flags = ["--multiplier=2", "--new-moments=reset", f"--optimizer-state={source}", "--quiet"]
    main(["expand", str(source), str(tmp_path / "out"), *flags])
    found = flat(read_moments(tmp_path / "out"))
    assert {len(t) for name, t in found.items() if "down_proj" in name and t.ndim} == {8}
    assert not any(t[4:].any() for name, t in found.items() if "gate_up_proj/exp_avg" in name)


def test_from_dense_to_moe_to_larger_moe(tmp_path: Path, texts: Path) -> None:
    dense = dense_folder(tmp_path / "dense", "llama", vocab_size=257)
    byte_tokenizer(64).save_pretrained(dense)
    chain = [dense, tmp_path / "moe", tmp_path / "larger", tmp_path / "largest"]
    # A copy of the FFN in each expert, so that each step is exact or nearly so.
    main(["upcycle", str(dense), str(chain[1]), "--num-experts=4", "--quiet"])
    main(["expand", str(chain[1]), str(chain[2]), "--num-experts=6", "--quiet"])
    flags = ["--router-extension=split", *size_flags(texts)]
    main(["expand", str(chain[2]), str(chain[3]), "--num-experts=12", *flags])
    assert load(chain[3]).config.num_local_experts == 12
    for made in chain[1:]:
        main(["verify", str(made), "--quiet"])
    embeddings = [tensors_of(folder)["model.embed_tokens.weight"] for folder in chain]
    assert all((embedding == embeddings[0]).all() for embedding in embeddings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-experts=3"], "num_experts=3 is less than the 4 experts"),
        (["--num-experts=13", "--selection=random"], "Pass --max-copies 4 or more"),
        (["--num-experts=6", "--multiplier=2"], "Give one of them"),
        (["--selection=greedy"], "goes by importance scores"),
        (["--selection=greedy", "--metric=gradient"], "Unknown metric 'gradient'"),
        (["--scores=nowhere", "--selection=greedy"], "no importance scores at nowhere"),
        (["--router-extension=split"], "there is none. Give --data NAME=FILE"),
        (["--router-extension=split,margin=6", "--demo"], "Unknown option of router_extension"),
        (["--router-extension=split,mixed_share=x", "--demo"], "is not OPTION=VALUE"),
        (["--demo"], "nothing would read it"),
        (["--data=a=short.txt", "--router-extension=fit"], "does not fill one sequence"),
        (["--data=short.txt", "--router-extension=fit"], "is not NAME=PATH"),
        (["--data=a=x", "--data=a=y", "--router-extension=fit"], "with a name of its own"),
        (["--demo", "--tokens=0", "--router-extension=fit"], "tokens=0"),
        (["--new-moments=none", "--optimizer-state=."], "Unknown new_moments 'none'"),
        (["--optimizer-state=."], "has no training/optimizer.safetensors"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line_with_the_remedy(
    flags: list[str],
    message: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    Path("short.txt").write_text("short")
    before = files_of(source.parent)
    assert fails("expand", source, "out", *flags, "--quiet") == 2
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if line.startswith("error: ")] == shown[-1:]
    assert message in shown[-1]
    assert files_of(source.parent) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=a=short.txt"], "does not fill one sequence"),
        (["--demo", "--tokens=0"], "tokens=0"),
        (["--demo", "--context-length=65"], "from 2 to the model's 64 positions"),
    ],
    ids=str,
)
def test_importance_that_cannot_be_measured(
    flags: list[str],
    message: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    Path("short.txt").write_text("short")
    assert fails("importance", source, *flags, "--quiet") == 2
    assert message in capsys.readouterr().err
    assert not Path("importance").exists()


def test_a_dense_model_has_no_experts_to_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails("importance", dense_folder(tmp_path / "dense"), "--demo", "--quiet") == 2
    assert "dense 'llama' model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["importance", "expand"])
def test_the_commands_say_what_they_need(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(command) == 2
    assert "usage:" in capsys.readouterr().err
    assert fails(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    for field in fields(ExpansionOptions) if command == "expand" else ():
        assert f"--{field.name.replace('_', '-')}" in shown
    assert fails("--help") == 0
    assert f"\n    {command}" in capsys.readouterr().out
