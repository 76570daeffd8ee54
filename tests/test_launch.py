"""Launch files: what they start, with torchrun, srun and the like replaced; and HF's Trainer."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_training import TOKENIZER, documents, moe_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fusion_upcycle.cli import _parser
from fusion_upcycle.cli.option_flags import given_options
from fusion_upcycle.training.options import make_training_options

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "examples" / "launch"


def started(script: str, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The words of the command that a launch file ends in."""
    for name in ("torchrun", "srun"):
        stub = folder / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        stub.chmod(0o755)
    for name, line in (("scontrol", "seq -f node%g 7 20000"), ("nvidia-smi", "echo a; echo b")):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / script), *arguments]
    done = subprocess.run(
        command, env=os.environ | path | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_files_are_bash(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)


def options_of(words: list[str]) -> dict[str, object]:
    """What `train` makes of the words behind `-m fusion_upcycle`."""
    parsed = _parser().parse_args(words[words.index("fusion_upcycle") + 1 :])
    options = make_training_options(**given_options(parsed))
    names = ("devices", "num_nodes", "strategy", "expert_parallel", "precision")
    return {name: getattr(options, name) for name in names}


def test_torchrun_is_started_as_the_documentation_says(tmp_path: Path) -> None:
    data = ("--demo", "--tokens", "100000", "--context-length", "128")
    words = started("torchrun.sh", tmp_path, "./moe", "./trained", *data, EXPERT_PARALLEL="2")
    documented = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in documented.splitlines() if line.startswith("torchrun ")]
    assert sorted(words) == sorted(line.split())
    expected = {"devices": 2, "num_nodes": 1, "strategy": "fsdp", "expert_parallel": 2}
    assert options_of(words) == expected | {"precision": "bf16-mixed"}


def test_slurm_starts_one_torchrun_on_each_machine(tmp_path: Path) -> None:
    job = {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77"}
    data = ("--demo", "--tokens", "1000000", "--batch-size", "32")
    words = started("slurm.sbatch", tmp_path, "moe", "out", *data, SLURM_JOB_NODELIST="x", **job)
    assert words[0] == "srun" and "torchrun" in words
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:29500"
    expected = {"devices": 8, "num_nodes": 2, "strategy": "fsdp", "expert_parallel": 8}
    assert options_of(words) == expected | {"precision": "bf16-mixed"}


def test_a_folder_trains_with_the_trainer_of_transformers(tmp_path: Path) -> None:
    moe = moe_model("qwen3_moe")
    moe.save_pretrained(tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_router_logits=True)
    ids = TOKENIZER("".join(documents(40)))["input_ids"]
    windows = [torch.tensor(ids[i : i + 16]) for i in range(0, 16 * 16, 16)]
    arguments = TrainingArguments(
        str(tmp_path / "work"),
        max_steps=8,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 8 and losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "trained"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    name = "model.layers.0.mlp.experts.down_proj"
    assert loaded.state_dict()[name].equal(model.state_dict()[name])
    assert not loaded.state_dict()[name].equal(moe.state_dict()[name])
