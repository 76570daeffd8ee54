"""Command-line flags of a dataclass of options, each explained by the option's own text."""

import argparse
import json
import re
import sys
from difflib import get_close_matches
from pkgutil import resolve_name
from typing import Any

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.options import default_text, explained, names

_INITIALISER = "NAME[,OPTION=VALUE...]"
#: What stands for the value in help texts; others are NAME, or N for a number.
_METAVARS = {
    "experts_per_token": "K",
    "granularity": "G",
    "expert_intermediate_size": "F",
    "shared_expert_intermediate_size": "F",
    "moe_layers": "LAYERS",
    "expert_init": _INITIALISER,
    "router_init": _INITIALISER,
    "router_extension": _INITIALISER,
    "ignore_config_fields": "FIELD[,FIELD...]",
    "mixture": "SOURCE=WEIGHT[,...]",
    "betas": "X,X",
    "freeze": "GROUP[,GROUP...]",
}


class Command(argparse.ArgumentParser):
    """A command that gets the flags of its options when it is called, so that others are quick."""

    _late: str | None = None

    def add_options(self, dataclass: str) -> None:
        """Add a flag for each option of a dataclass, named as in `package.module:Class`.

        A flag that is not given is absent from the result: the defaults are the dataclass's own.
        """
        self._late = dataclass

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        late, self._late = self._late, None
        if late is not None:
            options = resolve_name(late)
            _add_flags(self.add_argument_group("what decides the result"), options)
            self.set_defaults(options=names(options))
        given = args[0] if args and args[0] is not None else kwargs.pop("args", None)
        given = [self._as_flag(word) for word in (sys.argv[1:] if given is None else given)]
        parsed, left = super().parse_known_args(given, *args[1:], **kwargs)
        for word in left:
            flag = word.partition("=")[0]
            near = get_close_matches(flag, self._option_string_actions, 1, 0.7)
            if flag.startswith("--") and near:
                self.error(f"unrecognized argument {flag}: did you mean {near[0]}?")
        return parsed, left

    def _as_flag(self, word: str) -> str:
        """A flag in the spelling of Python and YAML, `--num_experts=8`, with hyphens."""
        flag, equals, value = word.partition("=")
        hyphened = flag.replace("_", "-")
        is_one = flag.startswith("--") and hyphened in self._option_string_actions
        return f"{hyphened}{equals}{value}" if is_one else word


def _add_flags(group: "argparse._ArgumentGroup", options: type) -> None:
    for option, text in explained(options):
        default = default_text(option)
        if default not in (None, "null", "[]"):
            text = f"{text.rstrip('.')} (default: {default})"
        kinds: dict[str, Any] = {"metavar": "NAME"}
        if option.type in (int, int | None):
            kinds = {"type": int, "metavar": "N"}
        elif option.type in (float, float | None):
            kinds = {"type": float, "metavar": "X"}
        elif option.type is bool:
            kinds = {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
        if option.name in _METAVARS:
            kinds["metavar"] = _METAVARS[option.name]
        group.add_argument(
            f"--{option.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=text.replace("`", "").replace("%", "%%"),
            **kinds,
        )


def add_making(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a folder is made; they change no bit of it."""
    parser.add_argument(
        "--verify",
        default="auto",
        metavar="HOW",
        help="the proof: layers streams both models, logits loads them as transformers does, none "
        "leaves it out; auto is layers (default: auto)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of the files (default: 5GB)"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload the proven folder to the Hugging Face Hub; made private if it is not there",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says what an adapter is put on."""
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="of a LoRA adapter: the model that it is put on (default: the one that its "
        "adapter_config.json names)",
    )


def given_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options of a command's dataclass for which a flag was given."""
    given = vars(parsed)
    return {
        name: _PARSERS.get(name, _as_it_is)(given[name]) for name in parsed.options if name in given
    }


def _as_it_is(value: Any) -> Any:
    return value


def _initialiser(text: str) -> dict[str, Any]:
    """`noise,noise_std=0.02` as `{"name": "noise", "noise_std": 0.02}`."""
    name, *words = text.split(",")
    spec: dict[str, Any] = {"name": name}
    for word in words:
        option, equals, value = word.partition("=")
        try:
            spec[option] = json.loads(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UpcyclingError(f"{word!r} is not OPTION=VALUE with a number, true or false.")
    return spec


def _layers(text: str) -> Any:
    """`0,2,5` as a list; names as they are; `encoder=last_6,decoder=none` for each stack apart."""
    if "=" in text:
        stacks = [stack.partition("=") for stack in text.split(",")]
        return {name: _layers(layers.replace("+", ",")) for name, _, layers in stacks}
    if text == "none":
        return []
    return [int(index) for index in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else text


def _numbers(text: str) -> list[float]:
    """`0.9,0.95` as a list."""
    return [_number(word) for word in text.split(",")]


def _weights(text: str) -> dict[str, float]:
    """`prose=0.4,source=0.6` as a mapping."""
    parts = (word.partition("=") for word in text.split(","))
    return {name: _number(weight) for name, _, weight in parts}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UpcyclingError(f"{text!r} is not a number.") from error


_PARSERS = {
    "mixture": _weights,
    "betas": _numbers,
    "freeze": lambda text: text.split(","),
    "expert_init": _initialiser,
    "router_init": _initialiser,
    "router_extension": _initialiser,
    "moe_layers": _layers,
    "ignore_config_fields": lambda text: text.strip("[]").replace(" ", "").split(","),
}
