"""Upcycle a real (tiny) language model, merge its fine-tunes, and compare, without any download.

Question: does the Mixture-of-Experts model compute what the dense model computed? And does a merged
          one beat other ways to merge (see merging.py)?
Command:  make demo, or: python examples/demo.py [--output FOLDER]
Needs:    two cores; under 4 minutes the first time (2 of training, cached), half of that later.
Expected: the same bits per byte on every text, from a model with 5.8 times the parameters; the
          merged model with a prototype router has the lowest mean of the merged ones.
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

POOL = ["modelpool=CausalLMPool/demo_base", "taskpool=CausalLMPerplexityTaskPool/demo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    output: Path = parser.parse_args().output
    moe = output / "moe"

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
    }
    for name, overrides in runs.items():
        fusion_bench([*overrides, *POOL, f"path.log_dir={output / name}"], output / name)

    records = {name: read_run_record(output / name) for name in runs}
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
    for name in runs:
        console.print(f"Run record:       {output / name / 'run_record.json'}")

    print("\nMerging the base's three fine-tunes (settings as chosen by merging.py --tune):")
    record = merging.compare(output / "merging", merging.CHOSEN)
    console.print(merging.table(read_run_record(record.parent)).to_rich())
    console.print(f"Settings: {merging.settings_in_words()}.", highlight=False)
    console.print(f"Run record:       {record}")


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
