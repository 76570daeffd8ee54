"""Sparse upcycling's options and published recipes as flags; light, so that `--help` is quick."""

import argparse
from typing import Any

from fusion_upcycle.cli.option_flags import Command, given_options
from fusion_upcycle.inspection.recipes import RECIPES, recipe_options


def add_planning(parser: Command) -> None:
    """`--recipe`, and one flag for each field of `UpcyclingOptions`."""
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"a published model's options: {', '.join(RECIPES)}"
    )
    parser.add_options("fusion_upcycle.upcycling.options:UpcyclingOptions")


def planning_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was asked for: the recipe's options, and in their place those that were given."""
    recipe = {} if parsed.recipe is None else recipe_options(parsed.recipe)
    return recipe | given_options(parsed)
