"""Write the tables of README and docs from the committed run records and the options themselves.

Command:  python examples/tables.py     (after a record was made again, or an option changed)
Expected: a page changes only where a record, the script that made it, or an option did;
          tests/test_readme.py holds that every table is what this writes.

What `inspect` knows of the studies, fusion_upcycle/inspection/measured.json, is written too.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is one of TABLES.
"""

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from fusion_upcycle.comparison.formats import to_markdown
from fusion_upcycle.comparison.results import read_results
from fusion_upcycle.comparison.rows import find_tasks, make_rows
from fusion_upcycle.comparison.tables import scores
from fusion_upcycle.options import markdown_table
from fusion_upcycle.report.tables import Table, bits_per_byte_table, read_run_record

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
RESULTS = EXAMPLES / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STUDIES = ("lever", "budget", "tokens", "scratch", "initialisers", "growing", "merged", "vision")
EXPERIMENTS = ("three_domains", "vision_three_tasks", "t5_three_tasks", "real_model")
MARKED = re.compile(r"(<!-- table: (?P<name>.*?) -->\n)(?P<table>.*?)(\n?<!-- end -->)", re.DOTALL)


def main() -> None:
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := with_tables(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(f"changed: {page.relative_to(ROOT)}")
    script("studies/measured.py").write()


def with_tables(text: str) -> str:
    """The text of a page with each of its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}\n<!-- end -->", text)


def script(path: str) -> ModuleType:
    """A script below examples/, which may import its neighbours."""
    file = EXAMPLES / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def demo() -> str:
    folder_name = script("demo.py").folder_name
    names = ("dense", "upcycled", "dense, trained on", "upcycled, trained on")
    records = {name: read_run_record(RESULTS / "demo" / folder_name(name)) for name in names}
    return bits_per_byte_table("", records).to_markdown()


def of_record(path: str, folder: Path, maker: str = "table") -> str:
    """What a script's own function makes of the record in a folder."""
    made = getattr(script(path), maker)(read_run_record(folder))
    return made if isinstance(made, str) else made.to_markdown()


def benchmark(name: str) -> dict:
    return json.loads((EXAMPLES / "benchmarks" / "results" / f"{name}.json").read_text())


def convert() -> str:
    return script("benchmarks/convert.py").markdown(benchmark("convert"))


def merge() -> str:
    return script("benchmarks/merge.py").table(benchmark("merge")["merge"]).to_markdown()


def plan() -> str:
    return script("benchmarks/plan.py").table(benchmark("plan")["plan"]).to_markdown()


def train() -> str:
    return script("benchmarks/train.py").table(benchmark("train")["train"], "main").to_markdown()


def fuzz() -> str:
    record = json.loads((RESULTS / "fuzz" / "fuzz.json").read_text())
    found = Table(
        "",
        ("what is read", "inputs", "refused", "bad", "most CPU s of one", "most MB of one"),
        [
            (
                name,
                f"{sum(surface['inputs'].values()):,}",
                f"{surface['refused']:,}",
                str(sum(bad["count"] for bad in surface["bad"].values())),
                f"{surface['cpu_seconds']:.2f}",
                f"{surface['megabytes']:.0f}",
            )
            for name, surface in record["surfaces"].items()
        ],
    )
    engines = " and ".join(f"{count:,} by {name}" for name, count in record["engines"].items())
    again = record.get("run_again")
    return (
        f"{found.to_markdown()}\n\n{record['inputs']:,} inputs ({engines}), seed {record['seed']}, "
        f"{record['bad']} bad." + (f" Mended and run again: {', '.join(again)}." if again else "")
    )


def experiment(name: str) -> str:
    """The scores of an experiment's runs, as its report has them."""
    folder = RESULTS / name
    results = read_results([folder])
    tasks = find_tasks([result for result in results if result.error is None])
    return to_markdown(scores(make_rows(results, tasks), tasks))


def study(name: str, maker: str = "show") -> str:
    record = read_run_record(EXAMPLES / "studies" / "results" / name)[name]
    return getattr(script(f"studies/{name}.py"), maker)(record["runs"])


def growing(name: str) -> str:
    record = read_run_record(EXAMPLES / "expert_upcycling" / "results" / name)[name]
    tables = script(f"expert_upcycling/{name}.py").tables(record)
    return "\n\n".join(f"{table.title}:\n\n{table.to_markdown()}" for table in tables)


def overview(name: str) -> str:
    return getattr(script("overview.py"), name)()


def options(module: str, name: str) -> str:
    """What a dataclass of options says of itself."""
    return markdown_table(getattr(importlib.import_module(f"fusion_upcycle.{module}"), name))


TABLES: dict[str, Callable[[], str]] = {
    "options of upcycling": partial(options, "upcycling.options", "UpcyclingOptions"),
    "options of merging": partial(options, "merging.options", "MergingOptions"),
    "options of expansion": partial(options, "expansion.options", "ExpansionOptions"),
    "options of training": partial(options, "training.options", "TrainingOptions"),
    "results": partial(overview, "results"),
    "families": partial(overview, "families"),
    "demo": demo,
    **{name: partial(experiment, name) for name in EXPERIMENTS},
    "step 0": partial(of_record, "studies/step0.py", RESULTS / "step0"),
    "exactness": partial(of_record, "exactness.py", RESULTS),
    "convert": convert,
    "faults": partial(of_record, "faults/conversions.py", RESULTS / "faults"),
    "fuzz": fuzz,
    "recipes": partial(of_record, "recipes.py", RESULTS / "recipes"),
    "readers": partial(of_record, "readers.py", RESULTS / "readers"),
    "merging": partial(of_record, "merging.py", RESULTS / "merging"),
    "prototypes": partial(of_record, "prototypes.py", RESULTS / "prototypes"),
    "memory": partial(of_record, "memory.py", RESULTS / "memory", "markdown"),
    "merge": merge,
    "plan": plan,
    "train": train,
    **{f"study {name}": partial(study, name) for name in STUDIES},
    "study budget, costs": partial(study, "budget", "costs"),
    "study vision, differences": partial(study, "vision", "differences"),
    "study vision, costs": partial(study, "vision", "costs"),
    "study growing, narrow": partial(study, "growing", "narrow"),
    "importance": partial(of_record, "importance.py", RESULTS / "importance"),
    "router": partial(growing, "router"),
    "sigmoid": partial(growing, "sigmoid"),
    "pairs": partial(of_record, "families.py", RESULTS / "families", "pairs_table"),
    "shards": partial(of_record, "families.py", RESULTS / "families", "shards_table"),
    "sentences": partial(of_record, "sentences.py", RESULTS / "sentences"),
    "real commands": partial(of_record, "real_model.py", RESULTS / "real_commands"),
    "real commands, lines": partial(
        of_record, "real_model.py", RESULTS / "real_commands", "commands"
    ),
    "real commands, answers": partial(
        of_record, "real_model.py", RESULTS / "real_commands", "answers"
    ),
    "sparse families": partial(
        of_record, "sparse_families.py", RESULTS / "sparse_families", "rows_table"
    ),
}


if __name__ == "__main__":
    main()
