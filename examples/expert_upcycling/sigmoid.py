"""Growing an MoE with sigmoid scores and a selection bias: which rows, and when may the bias move?

Question: a GLM-4.5 MoE of 16 experts, top-2, was trained with loss-free balancing. How far does the
          loss jump with each router extension when it grows to 32? And trained on with 15 % more
          tokens, should the selection bias move from the start, after half, or never?
Command:  python examples/expert_upcycling/sigmoid.py [--output FOLDER]        (about 30 minutes)
          ... --table examples/expert_upcycling/results/sigmoid
Needs:    one core; no download. What was stopped goes on with the next row.
Expected: `split` jumps by a sixth of what `fit` does, and by a fortieth of copies; it ends lowest
          if the selection bias stays still, and is ruined by one that moves.

The source is trained here, once: no model of this family is shipped. Calibration reads text that it
was trained on, training on reads `continued`; losses are nats per byte on validation text, mean of
the three demo domains, windows of 128 bytes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM

from fusion_upcycle.demo.models import domain_text
from fusion_upcycle.demo.recipe import BATCH_SIZE, CONTEXT_LENGTH, MOE_SHAPE
from fusion_upcycle.demo.texts import DOMAINS, demo_documents
from fusion_upcycle.demo.tokenizer import VOCABULARY_SIZE, byte_tokenizer
from fusion_upcycle.expansion.run import expand
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.texts.perplexity import perplexity
from fusion_upcycle.training.options import make_training_options
from fusion_upcycle.training.run import Origin, Places, train

SECTION = "sigmoid"
TOKENS, SHARE, SEEDS = 4_096_000, 0.15, (0, 1)
EXPERTS = MOE_SHAPE["num_local_experts"]
#: Router extensions, as options say them.
EXTENSIONS: dict[str, Any] = {
    "copy": "copy",
    "noise": "noise",
    "fit": "fit",
    "split": "split",
    "split, mixed share 0.1": {"name": "split", "mixed_share": 0.1},
}
#: What the selection bias does while the grown model is trained.
BIASES: dict[str, dict[str, float]] = {
    "moves": {"bias_update_rate": 0.001},
    "held for half": {"bias_update_rate": 0.001, "bias_update_after": 0.5},
    "still": {},
    "still, balance loss": {"balance_weight": 0.01},
}
#: Router extension -> seeds.
TRAINED: dict[str | None, tuple[int, ...]] = {
    None: SEEDS,
    "fit": SEEDS,
    "split": SEEDS,
    "split, mixed share 0.1": SEEDS[:1],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/sigmoid"))
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's tables")
    parser.add_argument("--record", type=Path, help="where to leave the run record (OUTPUT)")
    arguments = parser.parse_args()
    folder = arguments.table or arguments.record or arguments.output
    if not arguments.table:
        torch.set_num_threads(1)
        print(f"Run record: {write_run_record(SECTION, measured(arguments.output), folder)}")
    for table in tables(read_run_record(folder)[SECTION]):
        print(f"\n{table.title}\n\n{table.to_markdown()}")


def measured(output: Path) -> dict[str, Any]:
    source = output / "source"
    if not source.is_dir():
        train_source(output, source)
    before = once(output / "before.json", lambda: {"losses": losses(source)})

    def jumped(name: str) -> dict[str, Any]:
        return once(output / f"{name}.json", lambda: jump(source, output, name))

    def ran(name: str | None, bias: str, seed: int) -> dict[str, Any]:
        path = output / f"{name}, {bias}, {seed}.json"
        return once(path, lambda: trial(output, name, bias, seed))

    jumps = [jumped(name) for name in EXTENSIONS]
    runs = [
        ran(name, bias, seed)
        for seed in SEEDS
        for name, seeds in TRAINED.items()
        for bias in BIASES
        if seed in seeds
    ]
    return {"tokens": TOKENS, "share": SHARE, "before": before, "jumps": jumps, "trials": runs}


def train_source(output: Path, folder: Path) -> None:
    end = VOCABULARY_SIZE - 1
    hidden, heads = MOE_SHAPE["hidden_size"], MOE_SHAPE["num_attention_heads"]
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=VOCABULARY_SIZE, max_position_embeddings=CONTEXT_LENGTH, dtype="float32",
        bos_token_id=end, eos_token_id=end, pad_token_id=end, hidden_size=hidden,
        num_hidden_layers=MOE_SHAPE["num_hidden_layers"], num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=hidden // heads, use_qk_norm=False,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0
        },
        moe_intermediate_size=MOE_SHAPE["intermediate_size"], n_routed_experts=EXPERTS,
        num_experts_per_tok=2, n_shared_experts=0, first_k_dense_replace=0, n_group=1,
        topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0,
    )  # fmt: skip
    options = {"learning_rate": 8e-3, "warmup_share": 100 * BATCH_SIZE * CONTEXT_LENGTH / TOKENS}
    options |= {"decay_share": 0.0, "bias_update_rate": 0.001, "balance_weight": 0.0}
    trained(Glm4MoeForCausalLM(config), TOKENS, options, output, folder, split="train")


def trained(
    model: Any, tokens: int, options: dict[str, Any], work: Path, folder: Path, *, split: str,
    state: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train into a folder, with moments, without z-loss."""
    chosen = make_training_options(
        tokens=tokens, context_length=CONTEXT_LENGTH, batch_size=BATCH_SIZE, schedule="wsd",
        final_share=0.0, router_learning_rate=options["learning_rate"],
        z_weight=0.0, checkpoint_every=0, log_every=100, accelerator="cpu", save_moments=True,
        **options,
    )  # fmt: skip
    tokenizer, places = byte_tokenizer(CONTEXT_LENGTH), Places(work / "work", work / "log", folder)
    return train(
        model, tokenizer, chosen, data=demo_documents(split), places=places,
        origin=Origin("random weights"), optimizer_state=state, progress=False,
    ).record  # fmt: skip


def jump(source: Path, output: Path, name: str) -> dict[str, Any]:
    """Grow the source into a folder, and measure it."""
    calibrated = name not in ("copy", "noise")
    made = expand(
        source, output / "grown" / name, num_experts=2 * EXPERTS, router_extension=EXTENSIONS[name],
        calibration=demo_documents("train") if calibrated else None, context_length=CONTEXT_LENGTH,
        optimizer_state=source, overwrite=True, progress=False,
    )  # fmt: skip
    record = made.record
    return {
        "name": name,
        "losses": losses(output / "grown" / name),
        "router": record.get("router", {}).get("layers"),
        "seconds": made.costs,
    }


def trial(output: Path, name: str | None, bias: str, seed: int) -> dict[str, Any]:
    """Train one model on."""
    start = output / "source" if name is None else output / "grown" / name
    work = output / "trials" / f"{name}-{bias}-{seed}"
    options = {"learning_rate": 4e-3, "warmup_share": 0.0, "decay_share": 0.5, "seed": seed}
    options |= {"balance_weight": 0.0} | BIASES[bias]
    record = trained(
        AutoModelForCausalLM.from_pretrained(start), int(SHARE * TOKENS), options,
        work, work / "model", split="continued", state=start,
    )  # fmt: skip
    loads = {name: value for name, value in record["final"].items() if "load_cv" in name}
    return {
        "name": name,
        "bias": bias,
        "seed": seed,
        "losses": losses(work / "model"),
        "load_cv": loads,
        "tokens": record["tokens_trained"],
        "cost": record["cost"],
    }


def losses(folder: Path) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        domain: perplexity(
            model, tokenizer, domain_text(domain, "validation"), context_length=CONTEXT_LENGTH,
            stride=CONTEXT_LENGTH,
        )["loss_nats_per_token"]
        for domain in DOMAINS
    }  # fmt: skip


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier run found, or now."""
    if not path.is_file():
        found = make()
        path.write_text(json.dumps(found, indent=2))
        print(f"{path.stem}: {mean(found):.4f}", flush=True)
    return dict(json.loads(path.read_text()))


def mean(row: dict[str, Any]) -> float:
    return float(sum(row["losses"].values()) / len(row["losses"]))


def tables(record: dict[str, Any]) -> list[Table]:
    before = mean(record["before"])
    rows = []
    for row in record["jumps"]:
        layers = (row["router"] or {}).values()
        shares = [layer["smallest_copy_share"] for layer in layers]
        scales = [layer.get("score_scale", 1.0) for layer in layers]
        rows.append([
            row["name"],
            f"{mean(row) - before:+.4f}",
            f"{min(shares):.2f}" if shares else "-",
            f"{max(layer['weight_error'] for layer in layers):.3f}" if shares else "-",
            f"{min(scales):.3f}" if shares else "-",
        ])  # fmt: skip
    headers = ["router extension", "jump, nats per byte", "smallest copy share", "weight error"]
    first = Table(
        f"16 -> 32 experts; not grown: {before:.4f} nats per byte",
        [*headers, "score scale"], rows,
    )  # fmt: skip
    lines = []
    for name in TRAINED:
        of_arm = [row for row in record["trials"] if row["name"] == name]
        cells = [
            " ".join(f"{mean(row):.4f}" for row in of_arm if row["bias"] == bias) for bias in BIASES
        ]
        lines.append([name or "not grown", *cells])
    title = f"After {record['share']:.0%} more tokens, seeds {' and '.join(map(str, SEEDS))}"
    return [first, Table(title, ["", *(f"bias {bias}" for bias in BIASES)], lines)]


if __name__ == "__main__":
    main()
