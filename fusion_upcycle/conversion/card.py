"""The README.md of an output folder: what the model is, how it was made, and what was proven."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.models import auto_map
from fusion_upcycle.report.card import card_text

if TYPE_CHECKING:
    from fusion_upcycle.conversion.conversion import Conversion

#: Options that the card says elsewhere, or not.
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


@dataclass(frozen=True)
class CardWords:
    """What an operation says on the card of its result.

    Attributes:
        origin: what was made of which models, a paragraph.
        source_parameters: label -> number.
        proof: label of what was proven.
        caveat: what to keep in mind of a result that was proven.
    """

    origin: str
    source_parameters: Mapping[str, int]
    proof: str
    caveat: str


def model_card(conversion: "Conversion", record: Mapping[str, Any]) -> str:
    """A Hugging Face model card from the contents of `upcycling.json`."""
    words = conversion.in_words(record)
    counts, options = record["parameters"], record["options"]
    # Only a Hub id is a valid base_model; a local path means nothing to others.
    sources = record.get("sources", {"": record["source"]}).values()
    adapted = [source["base"] for source in sources if "base" in source]
    on_hub = list(dict.fromkeys(s["name"] for s in [*sources, *adapted] if s["from_hub"]))
    rows = [
        ("class", record["class"]),
        ("parameters, total", f"{counts['total']:,}"),
        ("parameters, active per token", f"{counts['active']:,}"),
        *((label, f"{number:,}") for label, number in words.source_parameters.items()),
        ("dtype", record["dtype"]),
        *_initialisers(options),
        *_other_options(options, type(conversion.options)),
        ("seed", options["seed"]),
        (words.proof, record["proof_in_words"]),
    ]
    caveat = words.caveat
    if record["proof"]["mode"] == "none":
        caveat = "The conversion was **not verified** (`verify=none`)."
    taken = dict(record.get("inherited", {}))
    notes = "".join(f"\n\n{note}" for note in taken.pop("notes", ()))
    tags = ["moe", record["method"].lower().replace(" ", "-"), "fusion_upcycle"]
    if conversion.relation == "merge":
        tags.append("merge")
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return card_text(
        f"""# {record["name"]}

{words.origin}

| | |
|---|---|
{table}

{caveat}{notes}{_loading(conversion)}{_balance(conversion)}

`upcycling.json` holds the duplication plan, all options and the proof.""",
        **{"pipeline_tag": _pipeline(record["class"])} | taken,
        tags=tags,
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        base_model_relation=conversion.relation if on_hub else None,
    )


#: Ending of a class' name -> what the Hub calls its task.
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "T5ForConditionalGeneration": "text2text-generation",
}


def _pipeline(name: str) -> str | None:
    return next((task for end, task in _PIPELINES.items() if name.endswith(end)), None)


def _loading(conversion: "Conversion") -> str:
    """How to load a model of our own class, which transformers does not bring."""
    if conversion.architecture.ships is None:
        return ""
    autos = auto_map(conversion.config)
    auto = next((name for name in autos if name.startswith("AutoModelFor")), "AutoModel")
    return f"""

transformers has no class for this model; `{conversion.architecture.ships.name}` in this folder is
one. With fusion_upcycle installed no code of the folder is run:

```python
import fusion_upcycle.models
from transformers import {auto}

model = {auto}.from_pretrained("FOLDER")
```

Without it, and with trust in the code of this folder:
`{auto}.from_pretrained("FOLDER", trust_remote_code=True)`."""


def _balance(conversion: "Conversion") -> str:
    """What training with transformers' own loss leaves out, unless it is told otherwise."""
    config = conversion.config
    weight = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", None) is not False or weight is None:
        return ""  # the class has no such loss
    return f"""

To train it with transformers' own loss, set `output_router_logits` to true, as in
`from_pretrained("FOLDER", output_router_logits=True)`: it is false in `config.json`, and without it
nothing keeps the experts in balance. The loss of balance counts {weight:g} times
(`router_aux_loss_coef`). `python -m fusion_upcycle train` has a loss of balance of its own."""


def public_name(source: Mapping[str, Any]) -> str:
    """The name of a source model as others may read it; of an adapter with its base's."""
    # Where it lies on this machine is nobody else's business.
    name = str(source["name"]) if source["from_hub"] else Path(source["name"]).name
    return f"{name}, a LoRA adapter of {public_name(source['base'])}" if "base" in source else name


def _initialisers(options: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    kinds = ("expert_init", "router_init", "router_extension")
    return [(kind.replace("_", " "), _in_words(options[kind])) for kind in kinds if kind in options]


def _in_words(initialiser: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in initialiser.items() if k != "name")
    return f"{initialiser['name']}" + (f" ({options})" if options else "")


def _other_options(options: Mapping[str, Any], kind: type) -> Sequence[tuple[str, Any]]:
    """A row for each option of this kind that is not at its default."""
    defaults = {field.name: field.default for field in fields(kind)}
    return [
        (name.replace("_", " "), value)
        for name, value in options.items()
        if name not in _SAID and name in defaults and value not in (defaults[name], [])
    ]
