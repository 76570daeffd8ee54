"""The planning options as command-line flags; light, so that `--help` is quick."""

import argparse
import json
import re
from dataclasses import fields
from functools import partial
from typing import Any

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.recipes import RECIPES, recipe_options

#: The families of `fusion_upcycle.architectures`, which takes too long to import for a help text.
TARGETS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_5_moe_text",
    "flex_olmo",
    "granitemoe",
    "ernie4_5_moe",
    "deepseek_v3",
    "glm4_moe",
)


def add_planning(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, and one flag for each field of `UpcyclingOptions`.

    A flag that is not given is absent from the result: the defaults are the dataclass's own.
    """
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"a published model's options: {', '.join(RECIPES)}"
    )
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add(
        "--target",
        metavar="FAMILY",
        help=f"MoE family: {' | '.join(TARGETS)} (default: auto, by the source)",
    )
    add("--num-experts", type=int, metavar="N", help="per layer (default: 4)")
    add("--experts-per-token", type=int, metavar="K", help="top-k (default: 2)")
    add(
        "--granularity",
        type=int,
        metavar="G",
        help="cut each FFN into G shards: N and K count shards then, multiples of G (default: 1)",
    )
    add(
        "--expert-intermediate-size",
        type=int,
        metavar="F",
        help="width of an expert (default: the FFN's, divided by G)",
    )
    add(
        "--moe-layers",
        metavar="LAYERS",
        help="all | every_N | last_N | indices as in 0,2,5 (default: all)",
    )
    add(
        "--normalize-topk-prob",
        action=argparse.BooleanOptionalAction,
        help="divide top-k weights by their sum; without, only a zero router is exact "
        "(default: true)",
    )
    add(
        "--shared-expert",
        metavar="NAME",
        help="copy | zero | none, where the family has one (default: auto, the family's choice)",
    )
    add(
        "--shared-expert-intermediate-size",
        type=int,
        metavar="F",
        help="its width; a wider one repeats neurons (default: the FFN's)",
    )
    add(
        "--expert-init",
        metavar="NAME[,OPTION=VALUE...]",
        help="copy | noise,noise_std=0.01 | drop,drop_ratio=0.5,paired=true | permute | subset | "
        "svd,kept_energy=0.9 | qwen2,drop_ratio=0.5 (default: copy)",
    )
    add(
        "--router-init",
        metavar="NAME[,OPTION=VALUE]",
        help="normal,std=0.02 | zeros (default: normal)",
    )
    add(
        "--dtype",
        metavar="NAME",
        help="float32 | bfloat16 | float16 | float64 (default: the source's)",
    )
    add("--seed", type=int, metavar="S", help="of every random draw (default: 0)")
    add(
        "--ignore-config-fields",
        metavar="FIELD[,FIELD...]",
        help="unknown fields of the source's config.json that you know to be without effect",
    )


def planning_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was asked for: the recipe's options, and in their place those that were given."""
    from fusion_upcycle.upcycling.options import UpcyclingOptions

    recipe = {} if parsed.recipe is None else recipe_options(parsed.recipe)
    return recipe | given_options(parsed, UpcyclingOptions)


def given_options(parsed: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass of options for which a flag was given."""
    given = vars(parsed)
    return {
        field.name: _PARSERS.get(field.name, _as_it_is)(given[field.name])
        for field in fields(options)
        if field.name in given
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


def _layers(text: str) -> str | list[int]:
    """`0,2,5` as a list; names as they are."""
    return [int(index) for index in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else text


_PARSERS = {
    "expert_init": _initialiser,
    "router_init": _initialiser,
    "router_extension": _initialiser,
    "moe_layers": _layers,
    "ignore_config_fields": lambda text: text.split(","),
}
