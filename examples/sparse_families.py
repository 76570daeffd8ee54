"""How exact is our own class, for every dense family of its table?

Question: does `Sparse<Dense>` compute the dense model at step 0, and does each expert do its part?
Command:  python examples/sparse_families.py --record examples/results/sparse_families (1 minute)
          python examples/sparse_families.py --table examples/results/sparse_families
Expected: float64 below 1e-12 of the largest output at step 0, and again against a computation by
          hand of each token's experts once routers and experts all differ; controls far above;
          the variance that a dropout makes that of the dense model, to 1 %.

The rows are measured by the code of the tests, `tests/sparse_rows.py`; dropout by more passes.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

SECTION = "sparse_families"
PASSES = 32768


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="run, and write run_record.json here")
    parser.add_argument("--table", type=Path, help="print the table of a record, as Markdown")
    arguments = parser.parse_args()
    if arguments.table is None:
        folder = arguments.record or Path("outputs/sparse_families")
        found = {"rows": measure_rows(), "dropouts": measure_dropouts()}
        print(f"Run record: {write_run_record(SECTION, found, folder)}")
    else:
        folder = arguments.table
    table = rows_table(read_run_record(folder))
    print(f"\n{table.title}\n\n{table.to_markdown()}")


def measure_rows() -> list[dict[str, Any]]:
    import sparse_rows

    rows = []
    for name in sparse_rows.ROWS:
        with tempfile.TemporaryDirectory() as folder:
            row = sparse_rows.convert(name, Path(folder))
            perturbed = sparse_rows.perturbed(row)
            rows.append(
                {
                    "row": name,
                    "model_type": row.model_type,
                    "class": row.made.record["class"],
                    "dtype": row.made.record["dtype"],
                    "step_0": sparse_rows.step_0(row),
                    "perturbed": perturbed.error,
                    "control": perturbed.control,
                    "one_expert": perturbed.one_expert,
                    "loading": {key: sorted(found) for key, found in row.info.items() if found},
                    "proof": row.made.proof.to_json(),
                }
            )
        print(f"{name}: step 0 {rows[-1]['step_0']:.1e}, perturbed {rows[-1]['perturbed']:.1e}")
    return rows


def measure_dropouts() -> list[dict[str, Any]]:
    import sparse_rows

    rows = []
    for model_type, field in sparse_rows.DROPOUTS:
        variance, ratio = sparse_rows.dropout_ratio(model_type, field, PASSES)
        rows.append(
            {"model_type": model_type, "field": field, "variance": variance, "ratio": ratio}
        )
        print(f"{model_type} {field}: variance ratio {ratio:.3f}")
    return rows


def rows_table(record: dict[str, Any]) -> Table:
    found = record[SECTION]
    ratios: dict[str, list[float]] = {}
    for row in found["dropouts"]:
        ratios.setdefault(row["model_type"], []).append(row["ratio"])
    rows = [
        [
            row["row"],
            row["class"],
            f"{row['step_0']:.1e}" + ("" if row["dtype"] == "float64" else f" ({row['dtype']})"),
            f"{row['perturbed']:.1e}",
            f"{row['control']:.0e}",
            ", ".join(f"{ratio:.3f}" for ratio in ratios.get(row["row"], [])) or "-",
        ]
        for row in found["rows"]
    ]
    headers = [
        "dense model",
        "class",
        "step 0",
        "experts that differ, by hand",
        "the same, 0.1 % off",
        "variance of dropout, sparse / dense",
    ]
    return Table("Largest difference / largest output of our own class", headers, rows)


if __name__ == "__main__":
    main()
