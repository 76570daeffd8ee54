"""What a result's card takes over from the cards of its sources: licence, language, data, task.

A card comes from a stranger: of a bounded size, read by safe YAML, and only fields that look as the
Hub's do are taken. What cannot be taken is said, and stops nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILE = "README.md"
#: Longest metadata that is read, in characters; those of the Hub have a few thousand.
_MOST_CHARACTERS = 65_536
_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n.*?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_NAME = r"[\w.+-]{1,96}"
#: Field -> what one value of it looks like.
_VALUES = {
    "license": _NAME,
    "license_name": _NAME,
    "license_link": r"[^\s<>\"'`|\\]{1,300}",
    "language": r"[A-Za-z][\w-]{0,31}",
    "datasets": rf"{_NAME}(/{_NAME})?",
    "pipeline_tag": r"[a-z0-9-]{1,64}",
}
_LISTS = ("language", "datasets")
_MOST_VALUES = 500
_LICENCE = ("license", "license_name", "license_link")


def inherited(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Card metadata of a result that is made from the models in these folders.

    Languages and data sets of all are joined; a licence or task is taken where all models with a
    card agree on it.

    Args:
        folders: name of each source model -> its folder.

    Returns:
        The fields, and `notes`: sentences on what was left out, and on licences that differ.
    """
    cards, notes = {}, []
    for name, folder in folders.items():
        cards[name], found = _read(folder, name if len(folders) > 1 else "the source")
        notes += found
    fields: dict[str, Any] = {}
    for field in _LISTS:
        joined = [value for card in cards.values() for value in card.get(field, [])]
        if joined:
            fields[field] = list(dict.fromkeys(joined))
    tasks = {card.get("pipeline_tag") for card in cards.values()}
    if len(tasks) == 1 and None not in tasks:
        fields["pipeline_tag"] = tasks.pop()
    licences = {n: {k: c[k] for k in _LICENCE if k in c} for n, c in cards.items()}
    first = next(iter(licences.values()))
    if all(licence == first for licence in licences.values()):
        fields |= first
    else:
        said = [f"{name}: {_licence(licence)}" for name, licence in licences.items()]
        notes.append(
            f"The licences of the source models differ ({', '.join(said)}): the card names none. "
            "Look at what each of them asks for before you publish the result."
        )
    return {name: value for name, value in (fields | {"notes": notes}).items() if value}


def _read(folder: Path, whose: str) -> tuple[dict[str, Any], list[str]]:
    """Fields of a folder's card that can be taken over, and what was left out of it, in words."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = folder / _FILE
    if not path.is_file():
        return {}, []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            text = file.read(_MOST_CHARACTERS)
    except OSError as error:
        return {}, [f"The card of {whose} cannot be read ({error.strerror}): it is not used."]
    block = _BLOCK.match(text)
    if block is None:
        cut = text.lstrip().startswith("---")
        return {}, [f"The card of {whose} has metadata without an end: nothing is used."] * cut
    if "<<" in block[0] or block[0].count("*") > _MOST_VALUES:  # a page may become a library
        return {}, [f"The card of {whose} has metadata of references: nothing is used."]
    try:
        data = ModelCard(block[0], ignore_metadata_errors=True).data.to_dict()
    except (YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        first = str(error).strip().splitlines()[0][:80] if str(error).strip() else repr(error)
        return {}, [f"The card of {whose} has metadata that is no YAML ({first}): nothing is used."]
    taken: dict[str, Any] = {}
    left: list[str] = []
    for field, value in _VALUES.items():
        given = data.get(field)
        if given is None:
            continue
        many = given if field in _LISTS and isinstance(given, list) else [given]
        pattern = re.compile(value)
        if len(many) > _MOST_VALUES or not all(
            isinstance(one, str) and pattern.fullmatch(one) for one in many
        ):
            left.append(field)
        else:
            taken[field] = many if field in _LISTS else many[0]
    words = f"The card of {whose} has a {' and a '.join(left)} that looks like none: not used."
    return taken, [words] if left else []


def _licence(fields: Mapping[str, str]) -> str:
    return fields.get("license_name", fields.get("license", "none"))
