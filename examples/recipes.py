"""Do the published recipes come out with the published numbers of parameters?

Question: does planning a published dense model with a recipe give the published MoE's counts?
Command:  python examples/recipes.py --record examples/results/recipes  (20 s, no weights needed)
          python examples/recipes.py --table examples/results/recipes   (prints the table again)
Expected: total and active parameters as published, to the digits published (tests/test_recipes.py
          holds that, against transformers' own models on the meta device).
"""

import argparse
from pathlib import Path
from typing import Any

from fusion_upcycle.inspection.economics import embedding_parameters
from fusion_upcycle.inspection.recipes import RECIPES, plan_recipe, recipe_options
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.upcycling.options import make_options

SECTION = "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="count, and write run_record.json here")
    parser.add_argument("--table", type=Path, help="print the table of a record, as Markdown")
    arguments = parser.parse_args()
    if arguments.table is None:
        folder = arguments.record or Path("outputs/recipes")
        print(f"Run record: {write_run_record(SECTION, {'rows': count()}, folder)}")
    else:
        folder = arguments.table
    print(table(read_run_record(folder)).to_markdown())


def count() -> list[dict[str, Any]]:
    rows = []
    for name, recipe in RECIPES.items():
        plan = plan_recipe(name, make_options(**recipe_options(name)))
        left_out = 0 if recipe.with_embeddings else embedding_parameters(plan)[1]
        counted = {kind: plan.parameters[kind] - left_out for kind in ("total", "active")}
        published = {"total": recipe.total, "active": recipe.active, "source": recipe.source}
        rows.append(
            {
                "recipe": name,
                "dense": recipe.dense,
                "target": plan.architecture.name,
                "with_embeddings": recipe.with_embeddings,
                "counted": counted,
                "published": published,
                "exact": plan.claims_exact,
            }
        )
    return rows


def table(record: dict[str, Any]) -> Table:
    rows = []
    for row in record[SECTION]["rows"]:
        counted, published = row["counted"], row["published"]
        rows.append(
            [
                f"`{row['recipe']}`",
                row["target"],
                *(f"{counted[kind] / 1e9:.2f}B" for kind in ("total", "active")),
                *(published[kind] or "-" for kind in ("total", "active")),
                "with" if row["with_embeddings"] else "without",
                "exact" if row["exact"] else "approximate",
            ]
        )
    headers = ["recipe", "target", "total", "active", "published total", "published active"]
    return Table("Recipes", [*headers, "embeddings", "step 0"], rows)


if __name__ == "__main__":
    main()
