"""The README.md of a model folder, with the metadata that the Hub reads."""

from typing import Any

_TEMPLATE = "---\n{{ card_data }}\n---\n\n{{ body }}\n"


def card_text(body: str, **metadata: Any) -> str:
    """A Hugging Face model card.

    Args:
        body: Markdown below the metadata.
        metadata: fields of `huggingface_hub.ModelCardData`; None leaves one out.
    """
    from huggingface_hub import ModelCard, ModelCardData

    known = {name: value for name, value in metadata.items() if value is not None}
    data = ModelCardData(library_name="transformers", **known)
    card = ModelCard.from_template(data, template_str=_TEMPLATE, body=body)
    return f"{card.content}\n"
