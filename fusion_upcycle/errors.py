"""How users' mistakes are reported: what, where, what to do. Invariants of ours are `assert`."""

import json
import logging
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from types import FrameType
from typing import Any

#: Characters of an error; a stranger's tensor may have a name of megabytes.
_LONGEST = 4000


def plain(text: str, most: int = _LONGEST) -> str:
    """What strangers may have written, as it can be shown: names of tensors, files, fields.

    What a terminal obeys (escape sequences, backspaces), what turns the direction of writing or
    cannot be seen, and halves of characters are written as `\\x1b`; line ends and tabs stay.

    Args:
        most: characters; of a longer text the middle is left out.
    """
    if len(text) > most:
        left_out = f" [... {len(text) - most:,} characters ...] "
        text = text[: most // 2] + left_out + text[-(most // 2) :]
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


class PlainLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose lines may have what strangers wrote in them: they are `plain`."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if self.isEnabledFor(level):
            said = plain(str(msg) % args if args else str(msg))
            self.logger.log(level, "%s", said, stacklevel=kwargs.pop("stacklevel", 1) + 2, **kwargs)


def plain_logger(name: str) -> PlainLogger:
    """The logger of a module that reads strangers' files."""
    return PlainLogger(logging.getLogger(name))


class UpcyclingError(ValueError):
    """A source, option or output that cannot be used; the message names it and the remedy.

    The message is `plain`, whatever is quoted in it.
    """

    def __init__(self, *said: object):
        super().__init__(*(plain(part) if isinstance(part, str) else part for part in said))


class ProofError(UpcyclingError):
    """A conversion that claims to be exact and is not. Nothing is left at the output path."""


class VersionError(UpcyclingError, ImportError):
    """A library that is installed in a version that does not work."""


class Stopped(SystemExit):
    """The end of the process that a signal asked for; the exit code is 128 and its number.

    Attributes:
        signal: that came.
        said: where the work stands, in words, for standard error; empty says nothing.
    """

    def __init__(self, asked: signal.Signals, said: str):
        super().__init__(128 + asked)
        self.signal, self.said = asked, said
        if said:
            print(f"Stopped by {asked.name} {said}.", file=sys.stderr, flush=True)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Have SIGINT and SIGTERM end a program in one line: what came, and what it left.

    A signal that is ignored stays so, and in other threads than the main one all do as they did.

    Raises:
        Stopped: one came in the block; its notes are what was said.
    """
    asked: list[Stopped] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(Stopped(signal.Signals(number), ""))
        raise asked[-1]

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        before = {each: how for each, how in found.items() if how is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    except Stopped as stopped:
        if stopped in asked:
            notes = getattr(stopped, "__notes__", ())
            said = " ".join((f"Stopped by {stopped.signal.name}.", *notes))
            print(said, file=sys.stderr, flush=True)
        raise
    finally:
        for each, how in before.items():
            signal.signal(each, how)


def unknown(kind: str, name: str, known: Iterable[str]) -> UpcyclingError:
    """The error for an unknown name, with the nearest known one suggested."""
    known = sorted(known)
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UpcyclingError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


def _in_python(name: str, value: Any) -> str:
    return name if value is ... else f"{name}={_literal(value)}"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(v)}' for key, v in value.items())}}}"
    return repr(value)


#: How an option is written where the program runs. The command line (`cli.spelling`) and
#: FusionBench's classes (`method.spelling`) say so themselves; all else is Python.
_SPELLING: ContextVar[Callable[[str, Any], str]] = ContextVar("spelling", default=_in_python)


def setting(name: str, value: Any = ...) -> str:
    """An option in the spelling of where the program runs, so that a remedy works when pasted.

    Args:
        name: of the option in Python.
        value: None for leaving it out; without one, the option is only named.

    Returns:
        For `setting("ignore_config_fields", ["x"])`: `ignore_config_fields=["x"]` in Python,
        `--ignore-config-fields x` on our command line, `'method.ignore_config_fields=[x]'` in
        FusionBench, quoted for a shell.
    """
    return _SPELLING.get()(name, value)


_SETTINGS = re.compile(r"\{(\w+)=(\w+)\}")


def with_settings(text: str) -> str:
    """A text with each `{option=value}` in it written as `setting` does."""

    def spelled_here(found: re.Match[str]) -> str:
        value = found[2]
        return setting(found[1], json.loads(value) if value in ("true", "false") else value)

    return re.sub(_SETTINGS, spelled_here, text)


def without_braces(text: str) -> str:
    """Such a text for files, which say the same wherever they were made: `option=value`."""
    return re.sub(_SETTINGS, r"\1=\2", text)


def spelled_in_python() -> bool:
    """Whether nobody has said yet how options are written here."""
    return _SPELLING.get() is _in_python


@contextmanager
def spelled(how: Callable[[str, Any], str]) -> Iterator[None]:
    """Have `setting` write options by `how(name, value)`; a value of `...` is only to be named."""
    token = _SPELLING.set(how)
    try:
        yield
    finally:
        _SPELLING.reset(token)


@contextmanager
def spelled_except(**texts: str) -> Iterator[None]:
    """Have `setting` write some options, whatever their value, by these texts."""
    others = _SPELLING.get()
    with spelled(lambda name, value: texts.get(name) or others(name, value)):
        yield


#: Libraries that fail, or are wrong in silence, in other versions; pyproject.toml says why.
REQUIRED = {"transformers": ">=5.21", "hydra-core": ">=1.3,<1.4", "fusion-bench": ">=0.2.33"}


def require_versions(*names: str) -> None:
    """Look at what is installed, without importing it.

    Args:
        names: of `REQUIRED`. One that is not installed is left to its import.

    Raises:
        VersionError: one that is too old, or too new.
    """
    from importlib import metadata

    from packaging.specifiers import SpecifierSet

    for name in names:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not SpecifierSet(REQUIRED[name]).contains(found, prereleases=True):
            wanted = f"{name}{REQUIRED[name]}"
            raise VersionError(
                f"{name} {found} is installed, but fusion_upcycle needs {wanted}: run "
                f"pip install '{wanted}'."
            )
