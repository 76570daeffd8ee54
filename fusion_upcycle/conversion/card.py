"""The README.md of an output folder: what the model is, how it was made, and what was proven."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from fusion_upcycle.upcycling.options import UpcyclingOptions

#: What a record calls the growing of an MoE.
EXPERT_UPCYCLING = "expert upcycling"


def model_card(record: dict[str, Any]) -> str:
    """A Hugging Face model card from the contents of `upcycling.json`."""
    from huggingface_hub import ModelCardData

    counts, options = record["parameters"], record["options"]
    sources = record.get("sources", {"": record["source"]})
    # Only a Hub id is a valid base_model; a local path means nothing to others.
    on_hub = [source["name"] for source in sources.values() if source["from_hub"]]
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if record["class"].endswith("ForCausalLM") else None,
        tags=["moe", record["method"].lower().replace(" ", "-"), "fusion_upcycle"],
        base_model=on_hub if "sources" in record and on_hub else next(iter(on_hub), None),
    )
    initialisers = "\n".join(
        f"| {kind.replace('_', ' ')} | {_describe(options[kind])} |"
        for kind in ("expert_init", "router_init", "router_extension")
        if kind in options
    )
    return f"""---
{card.to_yaml()}
---

# {record["name"]}

{_origin(record)}

| | |
|---|---|
| class | {record["class"]} |
| parameters, total | {counts["total"]:,} |
| parameters, active per token | {counts["active"]:,} |
{_source_parameters(record)}
| dtype | {record["dtype"]} |
{initialisers}{_other_options(options)}
| seed | {options["seed"]} |
| {"proof" if "sources" in record else "same function as the source"} | {record["proof_in_words"]} |

{_caveat(record)}

`upcycling.json` holds the duplication plan, all options and the proof.
"""


def _source_parameters(record: dict[str, Any]) -> str:
    counts = record["parameters"]
    if record["method"] == EXPERT_UPCYCLING:
        return (
            f"| parameters of the source, total | {counts['source']:,} |\n"
            f"| parameters of the source, active per token | {counts['source_active']:,} |"
        )
    which = "each" if "sources" in record else "the"
    return f"| parameters of {which} dense source | {counts['dense']:,} |"


def _describe(initialiser: dict[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in initialiser.items() if k != "name")
    return f"{initialiser['name']}" + (f" ({options})" if options else "")


#: Said elsewhere on the card.
_SAID = (
    "num_experts",
    "experts_per_token",
    "expert_init",
    "router_init",
    "router_extension",
    "selection",
    "seed",
    "dtype",
    "target",
)


def _other_options(options: dict[str, Any]) -> str:
    """A row for each option that is not at its default."""
    from fusion_upcycle.expansion.options import ExpansionOptions

    kind = ExpansionOptions if "router_extension" in options else UpcyclingOptions
    defaults = {field.name: field.default for field in fields(kind)}
    return "".join(
        f"\n| {name.replace('_', ' ')} | {value} |"
        for name, value in options.items()
        if name not in _SAID and name in defaults and value not in (defaults[name], [])
    )


def _origin(record: dict[str, Any]) -> str:
    """What was made of which models."""
    options, version = record["options"], record["versions"]["fusion_upcycle"]
    if record["method"] == EXPERT_UPCYCLING:
        experts, chosen = record["num_experts"], record["experts_per_token"]
        by = f", by {record['importance']['metric']}" if "importance" in record else ""
        return f"""A sparse Mixture-of-Experts model grown from `{_public(record["source"])}` with \
fusion_upcycle {version}:
each of {len(record["plan"])} MoE layers went from {experts["before"]} to {experts["after"]} \
experts (expert upcycling, arXiv 2604.19835;
selection: {options["selection"]}{by}). The router picks {chosen["after"]} experts for each token, \
and picked {chosen["before"]}.
It has not been trained since."""
    if "sources" not in record:
        return f"""A sparse Mixture-of-Experts model upcycled from the dense model \
`{_public(record["source"])}` with fusion_upcycle
{version}: the FFN of each of {len(record["plan"])} layers became {options["num_experts"]} experts,
of which a new router picks {options["experts_per_token"]} for each token. It has not been trained
since."""
    models = "\n".join(
        f"- {name}: `{_public(source)}`"
        + (f", experts {places}" if (places := record["experts"].get(name)) else "")
        for name, source in record["sources"].items()
    )
    rest = "the base model's" if options["shared"] == "base" else "the mean over these models"
    return f"""A sparse Mixture-of-Experts model merged from several dense models of one shape with
fusion_upcycle {version}:

{models}

The experts of each layer are these models' FFNs; all else is {rest}. The router picks
{options["experts_per_token"]} experts for each token. It has not been trained since."""


def _public(source: dict[str, Any]) -> str:
    # Where it lies on this machine is nobody else's business.
    return str(source["name"]) if source["from_hub"] else Path(source["name"]).name


def _caveat(record: dict[str, Any]) -> str:
    proof = record["proof"]
    if proof["mode"] == "none":
        return "The conversion was **not verified** (`verify=none`)."
    if "sources" in record:
        return "A merge computes no one model's function: the distances are those of one sample."
    if proof["claim"] == "approximate" and "reason" in proof:
        return (
            "Growing with top-k fixed does not keep the function: the model differs from its "
            f"source before training, by the distance above ({proof['reason']})."
        )
    if proof["claim"] == "approximate":
        return (
            "What was asked for does not keep the function: the model differs from its source "
            "before training, by the distance above."
        )
    return "At step 0 the model computes the same function as its source, as was checked."
