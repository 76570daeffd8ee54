"""Where a model is: a folder, or a LoRA adapter and the base model that it is put on."""

from dataclasses import dataclass
from pathlib import Path

from fusion_upcycle.checkpoint.adapter_config import read_adapter_config
from fusion_upcycle.checkpoint.peft import CONFIG_FILE, merge_command
from fusion_upcycle.checkpoint.source import locate
from fusion_upcycle.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from fusion_upcycle.errors import UpcyclingError, plain_logger, setting
from fusion_upcycle.untrusted import LARGE, read_bytes, read_object

log = plain_logger(__name__)


@dataclass(frozen=True)
class Located:
    """Where a model is on this machine.

    Attributes:
        folder: with its config, tokenizer and weights.
        adapter: folder of the LoRA adapter on top of them, if there is one.
    """

    folder: Path
    adapter: Path | None = None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    alone = not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    return (folder / CONFIG_FILE).is_file() and alone


def locate_model(source: str | Path, base: str | Path | None = None) -> Located:
    """The local folders of a model, which may be an adapter; Hub ids are fetched.

    Args:
        source: folder or Hub id.
        base: what an adapter is put on; None takes what its file names. Without effect for others.

    Raises:
        UpcyclingError: no such folder, an adapter of a kind that cannot be taken, or no base.
    """
    folder = locate(source)
    if not is_adapter(folder):
        return Located(folder)
    config = read_adapter_config(folder, base)
    named = base if base is not None else config.base
    if named is None:
        raise UpcyclingError(
            f"{folder / CONFIG_FILE} does not name the model that the adapter was trained on "
            f"(base_model_name_or_path). Give it: {setting('base', 'FOLDER')}."
        )
    if base is not None and config.base and Path(config.base).name != Path(base).name:
        log.warning(
            "The adapter %s says that it was trained on %s; it is put on %s, as asked.",
            source,
            config.base,
            base,
        )
    try:
        at = locate(named, revision=config.revision if str(named) == config.base else None)
    except UpcyclingError as error:
        if base is not None:
            raise
        raise UpcyclingError(
            f"The adapter {source} names its base model {named}, which is not to be had: {error} "
            f"Say where it is: {setting('base', 'FOLDER')}."
        ) from error
    if is_adapter(at):
        raise UpcyclingError(
            f"{at}, the base of the adapter {source}, is an adapter itself. Merge it first: "
            f"{merge_command(at)}."
        )
    _compare_tokenizers(folder, at)
    if base is None:
        log.info("The adapter %s is put on %s, which it names.", source, named)
    return Located(at, folder)


def _compare_tokenizers(adapter: Path, base: Path) -> None:
    """The result gets the base's tokenizer: refuse one that differs, say what it has more.

    Raises:
        UpcyclingError: a token that has another id in the adapter's.
    """
    own, others = _tokens(adapter), _tokens(base)
    if own and others:
        for token in sorted(own.keys() & others.keys()):
            if own[token] != others[token]:
                raise UpcyclingError(
                    f"{adapter / 'tokenizer.json'} gives the token {token!r} the id {own[token]}, "
                    f"and the base's ({base}) {others[token]}: the adapter is of another model. "
                    f"Give the one that it was trained on: {setting('base', 'FOLDER')}."
                )
        if more := sorted(own.keys() - others.keys(), key=own.__getitem__):
            log.warning(
                "The adapter %s has a tokenizer with tokens that its base's has not (%s). The "
                "result gets the base's tokenizer; copy the adapter's over if you need them.",
                adapter,
                ", ".join(more[:5]),
            )
    template = "chat_template.jinja"
    if (adapter / template).is_file() and (
        not (base / template).is_file()
        or read_bytes(adapter / template) != read_bytes(base / template)
    ):
        log.warning(
            "The adapter %s has a chat template of its own. The result gets the base's; copy %s "
            "over if you need it.",
            adapter,
            adapter / template,
        )


def _tokens(folder: Path) -> dict[str, int]:
    """Token -> id by a folder's `tokenizer.json`; empty without one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    said = read_object(path, LARGE)
    try:
        vocabulary = said["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in said.get("added_tokens") or ()}
        return {**vocabulary, **added}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpcyclingError(f"{path} is damaged ({error!r}). Download it again.") from error
