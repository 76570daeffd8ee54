"""Upcycle a real (tiny) language model, train it on, merge fine-tunes, without any download.

Question: does the Mixture-of-Experts model compute what the dense model computed, and does it learn
          more from the same compute (see examples/studies)? Does a merged one beat other ways to
          merge (see merging.py)?
Command:  make demo, or: python examples/demo.py [--output FOLDER]
Needs:    two cores, 2 minutes.
Expected: the same bits per byte on every text, from a model with 4.5 times the parameters; after
          training with equal compute 0.03 fewer than the dense model; the merged model with a
          prototype router has the lowest mean of the merged ones.
"""

import argparse
import multiprocessing
import os
import runpy
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import merging
from rich.console import Console

from fusion_upcycle.demo import demo_model
from fusion_upcycle.demo.recipe import BATCH_SIZE, CONTEXT_LENGTH
from fusion_upcycle.inspection.economics import economics
from fusion_upcycle.report.tables import bits_per_byte_table, read_run_record
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_folder

#: Of training the dense model on: a quarter of what the base was trained with.
TOKENS = 1_024_000
WARMUP_STEPS = 50
#: Of the upcycled model: one expert of 8 for each token, so that a token costs what it did.
EXPERTS = {"num_experts": 8, "experts_per_token": 1}
POOL = ["modelpool=CausalLMPool/demo_base", "taskpool=CausalLMPerplexityTaskPool/demo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    output: Path = parser.parse_args().output
    moe, trained = output / "moe", output / "trained_moe"
    warmup = WARMUP_STEPS * BATCH_SIZE * CONTEXT_LENGTH / TOKENS
    training = ["data=demo", f"context_length={CONTEXT_LENGTH}", f"batch_size={BATCH_SIZE}"]
    training += ["schedule=wsd", f"warmup_share={warmup:g}", "decay_share=0.5", "final_share=0"]
    training += ["learning_rate=2e-3", "progress=false", "resume=false"]

    with two_processes() as pool:
        print(f"Dense model: {demo_model('base')}", flush=True)
        compare(pool, output, moe, trained, training)


def equal_tokens() -> int:
    """Of training the upcycled model with the FLOPs that `TOKENS` cost in the dense one."""
    costs = economics(plan_folder(demo_model("base"), make_options(**EXPERTS)), CONTEXT_LENGTH)
    return round(TOKENS * costs.dense.flops / costs.upcycled.flops)


def compare(
    pool: ProcessPoolExecutor, output: Path, moe: Path, trained: Path, training: list[str]
) -> None:
    """All runs, two at a time, and what came out."""
    experts = [f"{name}={value}" for name, value in EXPERTS.items()]
    runs = {
        "dense": ["method=dummy"],
        "upcycled": [
            "method=mixtral_moe_upscaling",
            *prefixed("method.", experts),
            f"method.save_checkpoint={moe}",
            "method.overwrite=true",
        ],
        "dense, trained on": [
            "method=continued_pretraining",
            *prefixed("method.", [*training, f"tokens={TOKENS}"]),
        ],
        "upcycled, trained on": [
            "method=upcycle_and_train",
            "method/expert_init@method.upcycling.expert_init=noise",
            *prefixed("method.upcycling.", experts),
            *prefixed("method.training.", [*training, f"tokens={equal_tokens()}"]),
            f"method.training.save_checkpoint={trained}",
            "method.training.overwrite=true",
        ],
    }
    running = []
    for name, overrides in runs.items():
        log = output / folder_name(name)
        arguments = [*overrides, *POOL, f"path.log_dir={log}"]
        print(f"$ fusion_bench {shlex.join(arguments)}", flush=True)
        running.append((pool.submit(fusion_bench, arguments, log), log))
    for run, log in running:
        failed = run.exception()
        if failed is not None:
            sys.exit(f"{(log / 'console.log').read_text()}\nfusion_bench failed, see {log}")
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
    console.print(f"Trained on:       {trained}  (with the compute of {TOKENS:,} dense tokens)")
    for name in runs:
        console.print(f"Run record:       {output / folder_name(name) / 'run_record.json'}")

    print("\nMerging the base's three fine-tunes (settings as chosen by merging.py --tune):")
    ways = merging.ways()
    record = merging.compare(output / "merging", ways, pool.map)
    console.print(merging.table(read_run_record(record.parent)).to_rich())
    console.print(f"Settings: {merging.settings_in_words(ways)}.", highlight=False)
    console.print(f"Run record:       {record}")


def prefixed(prefix: str, options: list[str]) -> list[str]:
    return [prefix + option for option in options]


def folder_name(run: str) -> str:
    return run.replace(", ", "_").replace(" ", "_")


@contextmanager
def two_processes() -> Iterator[ProcessPoolExecutor]:
    """For functions in processes of their own, two at a time, with one thread each.

    They are forked from a server that has imported the libraries, which takes 10 s, while the base
    is trained.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusion_bench.scripts.cli", "fusion_upcycle.method", "merging"])
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server, and so of its children
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        pool.submit(os.getpid)  # starts the server
        yield pool


def fusion_bench(arguments: list[str], log_folder: Path) -> None:
    """What `fusion_bench ARGUMENTS` does, its output in `console.log`."""
    log_folder.mkdir(parents=True, exist_ok=True)
    with (log_folder / "console.log").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["fusion_bench", *arguments]
    try:
        runpy.run_module("fusion_bench.scripts.cli", run_name="__main__")
    except SystemExit as end:
        if end.code not in (0, None):
            raise RuntimeError(f"status {end.code}") from end


if __name__ == "__main__":
    main()
