"""Chat templates, stop tokens and generation configs of several models: the result has main's.

What main lacks is carried where all models that have one agree; nothing is dropped unsaid.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_upcycle.checkpoint.source import check_companions
from fusion_upcycle.errors import UpcyclingError, setting
from fusion_upcycle.merging.vocabularies import tokenizer_settings
from fusion_upcycle.untrusted import read_object, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_GENERATION = "generation_config.json"
_DEFAULT = "default"
_TEMPLATE_NAME = re.compile(r"\w[\w -]{0,99}")
_NOT_OF_GENERATION = ("transformers_version", "_from_model_config")


@dataclass(frozen=True)
class Companions:
    """What a result gets beside main's own files.

    Attributes:
        templates: name of a chat template -> its text; none: main's files count.
        generation: what `generation_config.json` says; None: main's file counts.
        notes: what was carried and dropped, in words.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()

    def put(self, folder: Path) -> list[str]:
        """Write them into a folder that has main's files; returns their names."""
        files = {}
        for name, text in self.templates.items():
            usual = name == _DEFAULT
            files["chat_template.jinja" if usual else f"additional_chat_templates/{name}.jinja"] = (
                text
            )
        if self.generation is not None:
            files[_GENERATION] = json.dumps(self.generation, indent=2) + "\n"
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        return list(files)


def agree_on_companions(
    folders: Mapping[str, Path],
    configs: "Mapping[str, PreTrainedConfig]",
    main: str,
    dropped: Mapping[str, Sequence[str]],
) -> Companions:
    """What of the models' templates, stop tokens and generation configs the result has.

    Args:
        folders: model -> its folder.
        configs: model -> its config.
        main: the model whose files are copied.
        dropped: model -> tokens of it that the result's tokenizer has not.

    Raises:
        UpcyclingError: a damaged file.
    """
    notes: list[str] = []
    templates = _templates(folders, main, dropped, notes)
    generation = {name: _generation(folder) for name, folder in folders.items()}
    rows = getattr(configs[main], "vocab_size", 0)
    made = _carried_generation(generation, main, rows, notes)
    stops = {name: stop_tokens(configs[name], generation[name]) for name in folders}
    current = stop_tokens(configs[main], generation[main] if made is None else made)
    donors = [name for name in folders if _chat_templates(folders[name])] if templates else []
    donors = donors or ([] if current else [name for name in folders if stops[name]])
    wanted = [stops[name] for name in donors]
    agreed = wanted[0] if wanted and all(stop == wanted[0] for stop in wanted) else []
    more = [stop for stop in agreed if stop not in current]
    if more and max(more) < rows:
        before = generation[main] if made is None else made
        made = {**_ids(configs[main]), **(before or {}), "eos_token_id": [*current, *more]}
        notes.append(f"stop tokens {more} of {', '.join(donors)} are carried, beside {current}")
        current = [*current, *more]
    notes += _dropped_stops(stops, current, main)
    return Companions(templates, made, notes)


def live_notes(models: "Mapping[str, PreTrainedModel]", main: str) -> list[str]:
    """Stop tokens of models in memory that the result, which has those of `main`, lacks."""
    stops = {
        name: stop_tokens(model.config, model.generation_config.to_dict())
        for name, model in models.items()
        if model.can_generate()
    }
    return _dropped_stops(stops, stops.get(main, []), main)


def _dropped_stops(stops: Mapping[str, list[int]], kept: list[int], main: str) -> list[str]:
    return [
        f"stop tokens of {name} are {others}; {main}'s {kept} are kept"
        for name, others in stops.items()
        if not set(others) <= set(kept)
    ]


def stop_tokens(config: "PreTrainedConfig", generation: Mapping[str, Any] | None) -> list[int]:
    """Token ids at which a model stops to write."""
    said = (generation or {}).get("eos_token_id")
    said = getattr(config, "eos_token_id", None) if said is None else said
    return [] if said is None else [said] if isinstance(said, int) else list(said)


def _ids(config: "PreTrainedConfig") -> dict[str, Any]:
    names = ("bos_token_id", "pad_token_id")
    return {name: v for name in names if (v := getattr(config, name, None)) is not None}


def _templates(
    folders: Mapping[str, Path],
    main: str,
    dropped: Mapping[str, Sequence[str]],
    notes: list[str],
) -> Mapping[str, str]:
    """Chat templates that are carried; main's own are in its files."""
    found = {n: given for n, folder in folders.items() if (given := _chat_templates(folder))}
    own = found.pop(main, None)
    if own is not None:
        if others := [name for name, given in found.items() if given != own]:
            notes.append(f"chat template of {', '.join(others)} dropped: {main}'s is kept")
        return {}
    if not found:
        return {}
    names = ", ".join(found)
    first, *more = found.values()
    if any(given != first for given in more):
        notes.append(
            f"chat templates of {names} differ, and {main} has none: all are dropped, the result "
            "has none"
        )
        return {}
    written = [
        token
        for tokens in dropped.values()
        for token in tokens
        if any(token in text for text in first.values())
    ]
    if written:
        notes.append(
            f"chat template of {names} dropped: it writes {written[0]!r}, which {main}'s tokenizer "
            f"lacks ({setting('vocabulary', 'largest')} takes both from the largest)"
        )
        return {}
    check_companions(folders[next(iter(found))])
    notes.append(f"chat template of {names} is carried: {main} has none")
    return first


def _chat_templates(folder: Path) -> dict[str, str]:
    """Name -> text of each chat template of a folder, as transformers finds them."""
    said: Any = tokenizer_settings(folder).get("chat_template") or {}
    try:
        if isinstance(said, list):
            said = {entry["name"]: entry["template"] for entry in said}
        found = {_DEFAULT: said} if isinstance(said, str) else dict(said)
        if (old := folder / "chat_template.json").is_file():
            found |= {_DEFAULT: read_object(old)["chat_template"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UpcyclingError(f"{folder} has a damaged chat template ({error!r}).") from error
    for name, text in found.items():
        # A name becomes that of a file in the output.
        whole = isinstance(text, str) and not re.search("[\ud800-\udfff]", text)
        if not whole or not _TEMPLATE_NAME.fullmatch(str(name)):
            raise UpcyclingError(
                f"{folder} has a chat template {name!r:.60} that is none, or whose name is no name "
                "of a file. Repair tokenizer_config.json."
            )
    if (file := folder / "chat_template.jinja").is_file():
        found[_DEFAULT] = read_text(file)
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[path.stem] = read_text(path)
    return found


def _generation(folder: Path) -> dict[str, Any] | None:
    path = folder / _GENERATION
    if not path.is_file():
        return None
    said = {k: v for k, v in read_object(path).items() if k not in _NOT_OF_GENERATION}
    for name, value in said.items():
        ids = value if isinstance(value, list) else [value] * (value is not None)
        if name.endswith("_token_id") and not all(type(n) is int for n in ids):
            raise UpcyclingError(
                f"{path}: {name}={str(value)[:60]} is no token id. Repair it, or remove the file."
            )
    return said


def _carried_generation(
    found: Mapping[str, dict[str, Any] | None], main: str, rows: int, notes: list[str]
) -> dict[str, Any] | None:
    """A generation config that main lacks, and all that have one agree on."""
    own = found[main]
    others = {name: said for name, said in found.items() if name != main and said is not None}
    if own is not None:
        for name, said in others.items():
            # Stop tokens are said by themselves.
            if fields := sorted(k for k in _differing(own, said) if k != "eos_token_id"):
                notes.append(
                    f"{_GENERATION} of {name} differs in {', '.join(fields)}: {main}'s is kept"
                )
        return None
    if not others:
        return None
    names = ", ".join(others)
    first, *more = others.values()
    if any(said != first for said in more):
        notes.append(f"{_GENERATION} of {names} differ, and {main} has none: all are dropped")
        return None
    if max(_token_ids(first), default=-1) >= rows:
        notes.append(f"{_GENERATION} of {names} dropped: it names tokens that the result has not")
        return None
    notes.append(f"{_GENERATION} of {names} is carried: {main} has none")
    return first


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[str]:
    return (k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))


def _token_ids(said: Mapping[str, Any]) -> list[int]:
    values = (value for name, value in said.items() if name.endswith("_token_id"))
    return [n for v in values for n in (v if isinstance(v, list) else [v]) if isinstance(n, int)]
