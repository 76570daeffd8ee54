"""How exact is every family, and every way to cut experts, at step 0?

Question: which dense models become which MoE, and does the result compute the same function?
Command:  python examples/families.py --record examples/results/families  (3 minutes on two cores)
          python examples/families.py --table examples/results/families   (prints the tables again)
Expected: every pair of families within 1e-4 of the largest logit in float32 with a random router,
          and within 1e-9 in float64 with a zero one (lfm2_moe: 5e-6); shards exact; `subset` and
          `qwen2` approximate.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from fusion_upcycle import upcycle
from fusion_upcycle.architectures import ARCHITECTURES, OWN
from fusion_upcycle.demo import demo_model
from fusion_upcycle.demo.random_models import random_dense
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record

SECTION = "families"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}
#: Fields that depend on the shape.
FIELDS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "youtu": {"num_key_value_heads": 8},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "hunyuan_v1_dense": {"head_dim": 32},
    "olmo3": {"layer_types": ["full_attention"] * 4},
    "qwen3_5_text": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
}
FIELDS["qwen3_5_text"]["num_hidden_layers"] = 6
FIELDS["ministral3"] = {
    "rope_parameters": dict(
        random_dense("ministral3").config.rope_parameters,
        original_max_position_embeddings=SHAPE["max_position_embeddings"],
    )
}
EIGHT = {"num_experts": 8, "experts_per_token": 2}
#: What is asked for -> options, on the trained demo Llama (FFN of 384 neurons).
SHARDS: dict[str, dict[str, Any]] = {
    "granularity=2": EIGHT | {"granularity": 2},
    "granularity=4": {"num_experts": 16, "experts_per_token": 4, "granularity": 4},
    "granularity=8": {"num_experts": 64, "experts_per_token": 8, "granularity": 8},
    "granularity=4, top-2 (half a group)": EIGHT | {"granularity": 4},
    "expert_init=subset": EIGHT | {"expert_init": "subset"},
    "expert_init=qwen2, width 96": {
        "num_experts": 16,
        "experts_per_token": 4,
        "expert_init": "qwen2",
        "expert_intermediate_size": 96,
    },
    "normalize_topk_prob=false": EIGHT | {"target": "qwen2_moe", "normalize_topk_prob": False},
    "normalize_topk_prob=false, zero router": EIGHT
    | {"target": "qwen2_moe", "normalize_topk_prob": False, "router_init": "zeros"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="run, and write run_record.json here")
    parser.add_argument("--table", type=Path, help="print the tables of a record, as Markdown")
    arguments = parser.parse_args()
    if arguments.table is None:
        folder = arguments.record or Path("outputs/families")
        found = {"pairs": measure_pairs(), "shards": measure_shards()}
        print(f"Run record: {write_run_record(SECTION, found, folder)}")
    else:
        folder = arguments.table
    record = read_run_record(folder)
    for table in (pairs_table(record), shards_table(record)):
        print(f"\n{table.title}\n\n{table.to_markdown()}")


def measure_pairs() -> list[dict[str, Any]]:
    """Every source of transformers' families, with each kind of shared expert that they have."""
    rows: list[dict[str, Any]] = []
    for target, family in ARCHITECTURES.without(OWN).items():
        kinds = ("none",) if family.shared is None else ("copy", "zero", "none")
        for source in family.dense:
            for shared in kinds:
                proofs = {
                    "float32": prove(source, target, shared, "float32", "normal"),
                    "bfloat16": prove(source, target, shared, "bfloat16", "normal"),
                    "float64": prove(source, target, shared, "float64", "zeros"),
                }
                rows.append({"source": source, "target": target, "shared_expert": shared} | proofs)
                found = relative(proofs["float32"]["function"])
                print(f"{source} -> {target}, shared {shared}: {found:.1e}")
    return rows


def prove(source: str, target: str, shared: str, dtype: str, router: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = SHAPE | FIELDS.get(source, {})
        random_dense(source, **fields).save_pretrained(folder / "dense")
        converted = upcycle(
            folder / "dense",
            folder / "moe",
            **EIGHT,
            target=target,
            shared_expert=shared,
            dtype=dtype,
            router_init=router,
            verify="logits",
            progress=False,
        )
        return converted.proof.to_json()


def measure_shards() -> list[dict[str, Any]]:
    rows = []
    for name, options in SHARDS.items():
        with tempfile.TemporaryDirectory() as folder:
            made = upcycle(
                demo_model("base"), Path(folder) / "moe", verify="layers", progress=False, **options
            )
        rows.append({"asked": name, "options": options, "proof": made.proof.to_json()})
        print(f"{name}: {made.proof}")
    return rows


def relative(distance: dict[str, Any]) -> float:
    return float(distance["max_abs"] / distance["scale"])


def words(number: float) -> str:
    return f"{number:.1e}" if number else "0"


def verdict(proofs: list[dict[str, Any]]) -> str:
    return "exact" if all(proof.get("holds") for proof in proofs) else "approximate"


def pairs_table(record: dict[str, Any]) -> Table:
    """A pair a line, the worst of its kinds of shared expert."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record[SECTION]["pairs"]:
        pairs.setdefault((row["source"], row["target"]), []).append(row)
    rows = []
    for (source, target), kinds in pairs.items():
        worst = [
            max(relative(row[dtype][which]) for row in kinds)
            for dtype, which in (
                ("float32", "function"),
                ("float64", "function"),
                ("bfloat16", "own_dtype"),
            )
        ]
        shared = ", ".join(row["shared_expert"] for row in kinds)
        proofs = [row[dtype] for row in kinds for dtype in ("float32", "float64", "bfloat16")]
        rows.append([source, target, shared, *map(words, worst), verdict(proofs)])
    headers = [
        "source",
        "target",
        "shared expert",
        "float32, random router",
        "float64, zero router",
        "bfloat16 arithmetic, random router",
        "verdict",
    ]
    return Table("Largest logit difference / largest logit, by family", headers, rows)


def shards_table(record: dict[str, Any]) -> Table:
    rows = []
    for row in record[SECTION]["shards"]:
        proof, layers = row["proof"], row["proof"]["layers"]
        rows.append(
            [
                row["asked"],
                words(relative(proof["function"])),
                words(layers["worst_layer_max_abs"] / layers["worst_layer_scale"]),
                words(proof["function"]["kl_nats"]),
                verdict([proof]),
            ]
        )
    headers = [
        "experts of the demo Llama",
        "largest logit difference / largest logit",
        "worst layer, FFN output",
        "KL, nats/token",
        "verdict",
    ]
    return Table("Ways to cut experts", headers, rows)


if __name__ == "__main__":
    main()
