"""The README.md of an output folder: what the model is, how it was made, and what was proven."""

from pathlib import Path
from typing import Any


def model_card(record: dict[str, Any]) -> str:
    """A Hugging Face model card from the contents of `upcycling.json`."""
    from huggingface_hub import ModelCardData

    counts, options, proof = record["parameters"], record["options"], record["proof"]
    source = record["source"]["name"]
    if not record["source"]["from_hub"]:
        source = Path(source).name  # where it lies on this machine is nobody else's business
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if record["class"].endswith("ForCausalLM") else None,
        tags=["moe", "sparse-upcycling", "fusion_upcycle"],
        # Only a Hub id is a valid base_model; a local path means nothing to others.
        base_model=source if record["source"]["from_hub"] else None,
    )
    initialisers = "\n".join(
        f"| {kind.replace('_', ' ')} | {_describe(options[kind])} |"
        for kind in ("expert_init", "router_init")
    )
    return f"""---
{card.to_yaml()}
---

# {record["name"]}

A sparse Mixture-of-Experts model upcycled from the dense model `{source}` with fusion_upcycle
{record["versions"]["fusion_upcycle"]}: each FFN was copied into {options["num_experts"]} experts,
of which a new router picks {options["experts_per_token"]} for each token. It has not been trained
since.

| | |
|---|---|
| class | {record["class"]} |
| parameters, total | {counts["total"]:,} |
| parameters, active per token | {counts["active"]:,} |
| parameters of the dense source | {counts["dense"]:,} |
| dtype | {record["dtype"]} |
{initialisers}
| seed | {options["seed"]} |
| same function as the source | {record["proof_in_words"]} |

{_caveat(proof)}

`upcycling.json` holds the duplication plan, all options and the proof.
"""


def _describe(initialiser: dict[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in initialiser.items() if k != "name")
    return f"{initialiser['name']}" + (f" ({options})" if options else "")


def _caveat(proof: dict[str, Any]) -> str:
    if proof["mode"] == "none":
        return "The conversion was **not verified** (`verify=none`)."
    if proof["claim"] == "approximate":
        return (
            "The expert initialiser changes the weights, so the model differs from its source "
            "before training, by the distance above."
        )
    return "At step 0 the model computes the same function as its source, as was checked."
