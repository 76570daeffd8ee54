"""Upcycle a real (tiny) language model, train it on, merge fine-tunes, without any download.

Question: does the Mixture-of-Experts model compute what the dense model computed, and does it learn
          more from the same text (see study.py)? Does a merged one beat other ways to merge (see
          merging.py)?
Command:  make demo, or: python examples/demo.py [--output FOLDER]
Needs:    two cores; under 5 minutes the first time (2 of training, cached), 3 later.
Expected: the same bits per byte on every text, from a model with 5.8 times the parameters; fewer
          than the dense model after the same tokens; the merged model with a prototype router has
          the lowest mean of the merged ones.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import merging
from rich.console import Console

from fusion_upcycle.demo import demo_model
from fusion_upcycle.report.tables import bits_per_byte_table, read_run_record

#: Of training on: enough for a first result in seconds.
TOKENS = 100_000
POOL = ["modelpool=CausalLMPool/demo_base", "taskpool=CausalLMPerplexityTaskPool/demo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    output: Path = parser.parse_args().output
    moe, trained = output / "moe", output / "trained_moe"
    training = ["data=demo", f"tokens={TOKENS}", "context_length=256"]
    training += ["schedule=cosine", "learning_rate=3e-4", "progress=false"]
    training += ["resume=false"]
    training += ["mixture={prose: 0.4, source: 0.4, arithmetic: 0.2}"]  # as the base was trained

    print(f"Dense model: {demo_model('base')}", flush=True)
    runs = {
        "dense": ["method=dummy"],
        "upcycled": [
            "method=mixtral_moe_upscaling",
            "method.num_experts=8",
            "method.experts_per_token=2",
            f"method.save_checkpoint={moe}",
            "method.overwrite=true",
        ],
        "dense, trained on": ["method=continued_pretraining", *prefixed("method.", training)],
        "upcycled, trained on": [
            "method=upcycle_and_train",
            "method/expert_init@method.upcycling.expert_init=noise",
            "method.upcycling.num_experts=8",
            "method.upcycling.experts_per_token=2",
            *prefixed("method.training.", training),
            f"method.training.save_checkpoint={trained}",
            "method.training.overwrite=true",
        ],
    }
    for name, overrides in runs.items():
        log = output / folder_name(name)
        fusion_bench([*overrides, *POOL, f"path.log_dir={log}"], log)

    records = {name: read_run_record(output / folder_name(name)) for name in runs}
    console = Console()
    console.print(bits_per_byte_table("Held-out demo text", records).to_rich())
    proof = records["upcycled"]["method"]["proof"]
    console.print(
        f"Same function as the dense model: {proof['holds']}; largest logit difference "
        f"{proof['function']['max_abs']:.1e} of logits up to {proof['function']['scale']:.3g}."
    )
    console.print(
        f"Upcycled model:   {moe}  (a Hugging Face folder; its README.md is the model card)"
    )
    console.print(f"Trained on:       {trained}  ({TOKENS:,} tokens)")
    for name in runs:
        console.print(f"Run record:       {output / folder_name(name) / 'run_record.json'}")

    print("\nMerging the base's three fine-tunes (settings as chosen by merging.py --tune):")
    ways = merging.ways()
    record = merging.compare(output / "merging", ways)
    console.print(merging.table(read_run_record(record.parent)).to_rich())
    console.print(f"Settings: {merging.settings_in_words(ways)}.", highlight=False)
    console.print(f"Run record:       {record}")


def prefixed(prefix: str, options: list[str]) -> list[str]:
    return [prefix + option for option in options]


def folder_name(run: str) -> str:
    return run.replace(", ", "_").replace(" ", "_")


def fusion_bench(arguments: list[str], log_folder: Path) -> None:
    """Run the FusionBench CLI, its output in `console.log`; a failure shows that output."""
    log_folder.mkdir(parents=True, exist_ok=True)
    log = log_folder / "console.log"
    print(f"$ fusion_bench {shlex.join(arguments)}", flush=True)
    command = [Path(sys.executable).with_name("fusion_bench"), *arguments]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status != 0:
        sys.exit(f"{log.read_text()}\nfusion_bench failed with status {status}, see {log}")


if __name__ == "__main__":
    main()
