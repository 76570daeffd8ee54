"""How exact is each initialiser at step 0, in each dtype?

Question: how far is the upcycled model from its dense source before any training?
Command:  python examples/exactness.py --record examples/results  (10 s on two cores)
          python examples/exactness.py --table examples/results   (prints the table again)
Expected: copy and permute within 1e-4 of the largest logit in float32 arithmetic; bit-identical
          logits in bfloat16 with a zero router; noise and drop off by what they change.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from fusion_upcycle import upcycle
from fusion_upcycle.demo import demo_model
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record

SECTION = "exactness"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
COPY = ("copy", "normal")
ALL = (COPY, ("copy", "zeros"), ("permute", "normal"), ("noise", "normal"), ("drop", "normal"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="run, and write run_record.json here")
    parser.add_argument("--table", type=Path, help="print the table of a record, as Markdown")
    arguments = parser.parse_args()
    if arguments.table is None:
        folder = arguments.record or Path("outputs/exactness")
        print(f"Run record: {write_run_record(SECTION, {'rows': measure()}, folder)}")
    else:
        folder = arguments.table
    print(table(read_run_record(folder)).to_markdown())


def measure() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_models(folder)
        sources = {
            "demo Llama (trained)": (demo_model("base"), ALL),
            "random Llama, llama3 rope, tied": (folder / "llama", (COPY,)),
            "random Mistral, sliding window 32": (folder / "mistral", (COPY,)),
        }
        for source, (path, pairs) in sources.items():
            for dtype in ("float32", "bfloat16"):
                for expert_init, router_init in pairs:
                    proof = upcycle(
                        path,
                        folder / "moe",
                        num_experts=8,
                        experts_per_token=2,
                        expert_init=expert_init,
                        router_init=router_init,
                        dtype=dtype,
                        verify="logits",
                        overwrite=True,
                        progress=False,
                    ).proof
                    rows.append(
                        {
                            "source": source,
                            "dtype": dtype,
                            "expert_init": expert_init,
                            "router_init": router_init,
                            "proof": proof.to_json(),
                        }
                    )
                    print(f"{source}, {dtype}, {expert_init}, {router_init}: {proof}", flush=True)
    return rows


def random_models(folder: Path) -> None:
    """Random weights, norms far from 1, logits of a few units."""
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(
            LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
        ),
        "mistral": MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=32)),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)


def relative(found: dict[str, float]) -> str:
    return f"{found['max_abs'] / found['scale']:.1e}" if found["max_abs"] else "0 (bit-identical)"


def table(record: dict) -> Table:
    rows = []
    for row in record[SECTION]["rows"]:
        function = row["proof"]["function"]
        own = row["proof"].get("own_dtype", function)
        rows.append(
            [
                f"{row['source']}, {row['dtype']}",
                row["expert_init"],
                row["router_init"],
                relative(function),
                relative(own),
                f"{function['kl_nats']:.1e}" if function["kl_nats"] else "0",
                f"{function['argmax_agreement']:.1%}",
                {True: "exact", None: "approximate"}[row["proof"].get("holds")],
            ]
        )
    headers = [
        "source",
        "experts",
        "router",
        "largest logit difference / largest logit, float32 arithmetic",
        "same, in the model's dtype",
        "KL, nats/token",
        "same arg-max",
        "verdict",
    ]
    return Table("Distance from the dense source at step 0", headers, rows)


if __name__ == "__main__":
    main()
