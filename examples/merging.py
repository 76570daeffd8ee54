"""Three fine-tunes of one model, merged: into one dense model, or into one Mixture of Experts?

Question: without any training, does a merged MoE whose router is made from each model's own texts
          (`router_init=prototype`) beat FusionBench's ways to merge into one dense model?
Command:  python examples/merging.py [--record FOLDER]    (1 minute on two cores; part of make demo)
          python examples/merging.py --tune --record examples/results/merging     (4 minutes)
Needs:    the demo models, which are shipped.
Expected: the prototype router has the lowest mean of bits per byte over the three domains, lower
          than the base and every merge into a dense model; a random router is no better than the
          best of these.

Each way to merge is a YAML in examples/merges: `name` of its row (by default the file's), `method`,
and `trials`, the values to try of each setting. With --tune a way's settings are chosen on
validation text first, from all combinations, the same number for each way; the record has them all,
and the YAML what came out. The table is of test text.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from fusion_upcycle.demo import DOMAINS, demo_model
from fusion_upcycle.demo.models import bits_per_byte
from fusion_upcycle.demo.recipe import CONTEXT_LENGTH
from fusion_upcycle.modelpool import DemoCausalLMPool
from fusion_upcycle.report.progress import loading_bars
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record

POOL = {"_pretrained_": "base"} | {domain: domain for domain in DOMAINS}
MERGES = Path(__file__).resolve().parent / "merges"


@dataclass(frozen=True)
class Way:
    """A way to merge.

    Attributes:
        name: of its row.
        method: config node of a FusionBench method.
        trials: place in `method` of a setting, as in `router_init.whiten` -> values to try.
    """

    name: str
    method: dict[str, Any]
    trials: dict[str, list[Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """What is tried, as `method` has it: name of the setting -> value."""
        node = OmegaConf.create(self.method)
        return {_name(place): OmegaConf.select(node, place) for place in self.trials}

    def all_settings(self) -> list[dict[str, Any]]:
        """Every combination of what is to be tried; none where there is nothing."""
        names = [_name(place) for place in self.trials]
        combinations = product(*self.trials.values()) if self.trials else []
        return [dict(zip(names, values, strict=True)) for values in combinations]

    def with_settings(self, settings: dict[str, Any]) -> "Way":
        node = OmegaConf.create(self.method)
        for place in self.trials:
            OmegaConf.update(node, place, settings[_name(place)])
        return Way(self.name, OmegaConf.to_container(node), self.trials)  # type: ignore[arg-type]

    def merged(self) -> PreTrainedModel:
        """The demo fine-tunes, merged in memory; without FusionBench's words on its steps."""
        algorithm = instantiate(self.method, _recursive_=False, _convert_="all")
        with redirect_stdout(io.StringIO()), loading_bars(False):
            return algorithm.run(DemoCausalLMPool(POOL))


def _name(place: str) -> str:
    return place.rpartition(".")[2]


def ways(folder: Path = MERGES) -> list[Way]:
    """All of a folder: those into a dense model first, by the names of their files."""
    found = []
    for file in sorted(folder.glob("*.yaml")):
        content = {"name": file.stem, "trials": {}} | OmegaConf.to_container(OmegaConf.load(file))
        found.append(Way(**content))
    return sorted(found, key=lambda way: way.method["_target_"].startswith("fusion_upcycle."))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", action="store_true", help="choose the settings anew")
    parser.add_argument("--record", type=Path, default=Path("outputs/merging"))
    arguments = parser.parse_args()
    compared = ways()
    if arguments.tune:
        write_run_record("tuning", tune(compared), arguments.record)
        chosen = read_run_record(arguments.record)["tuning"]["chosen"]
        for way in compared:
            if way.trials and way.settings != chosen[way.name]:
                print(f"{MERGES}: the settings of {way.name} should be {chosen[way.name]}")
        compared = [way.with_settings(chosen[way.name]) if way.trials else way for way in compared]
    print(f"Run record: {compare(arguments.record, compared)}")
    Console().print(table(read_run_record(arguments.record)).to_rich())


def tune(compared: list[Way]) -> dict[str, Any]:
    """Every trial on validation text, and the best setting of each way."""
    trials: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, Any]] = {}
    for way in compared:
        mine = []
        for settings in way.all_settings():
            model = way.with_settings(settings).merged()
            scores = evaluate(model, "validation", stride=CONTEXT_LENGTH)
            mine.append({"method": way.name, "settings": settings, "bits_per_byte": scores})
            print(f"{way.name} {settings}: {scores['mean']:.4f}", flush=True)
        trials += mine
        if mine:
            best = min(mine, key=lambda trial: trial["bits_per_byte"]["mean"])
            chosen[way.name] = best["settings"]
    return {"split": "validation", "stride": CONTEXT_LENGTH, "trials": trials, "chosen": chosen}


def compare(folder: Path, compared: list[Way], run: Callable[..., Iterable[Any]] = map) -> Path:
    """Every model and every merge on test text; one run record.

    Args:
        run: as `map`, perhaps in several processes.
    """
    rows = {name: as_it_was_made(name) for name in POOL.values()}
    for way, row in zip(compared, run(merged_row, compared), strict=True):
        rows[way.name] = row
        print(f"{way.name}: {row['bits_per_byte']['mean']:.4f} bits per byte", flush=True)
    comparison = {"split": "test", "stride": CONTEXT_LENGTH // 2, "rows": rows}
    path = write_run_record("merging", comparison, folder)
    assert path is not None  # only without a folder
    return path


def merged_row(way: Way) -> dict[str, Any]:
    """Merge, and measure."""
    with loading_bars(False):
        model = way.merged()
    return {
        "settings": way.settings,
        "method": way.method,
        "bits_per_byte": evaluate(model, "test", stride=CONTEXT_LENGTH // 2),
        "parameters": model.num_parameters(),
        "active": model.num_parameters() - idle_parameters(model),
    }


def as_it_was_made(name: str) -> dict[str, Any]:
    """The row of a demo model, which was measured in the same way when it was made."""
    facts = json.loads((demo_model(name) / "demo.json").read_text(encoding="utf-8"))
    scores = facts["bits_per_byte"]
    return {
        "settings": {},
        "method": None,
        "bits_per_byte": scores | {"mean": sum(scores.values()) / len(scores)},
        "parameters": facts["parameters"],
        "active": facts["parameters"],
    }


def idle_parameters(model: PreTrainedModel) -> int:
    """Of the experts that a token does not use."""
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    return sum(p.numel() // len(p) * (len(p) - model.config.num_experts_per_tok) for p in experts)


def evaluate(model: PreTrainedModel, split: str, stride: int) -> dict[str, float]:
    """Bits per byte of each domain, and their mean."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model("base"))
    scores = bits_per_byte(model, tokenizer, CONTEXT_LENGTH, split, stride)
    return scores | {"mean": sum(scores.values()) / len(scores)}


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            *(f"{row['bits_per_byte'][text]:.4f}" for text in (*DOMAINS, "mean")),
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['active'] / 1e6:.2f}M",
        ]
        for name, row in record["merging"]["rows"].items()
    ]
    headers = ["bits per byte", *DOMAINS, "mean", "size", "active"]
    return Table("Three fine-tunes merged, held-out demo text", headers, rows)


def settings_in_words(compared: list[Way]) -> str:
    """What was chosen for each way."""
    return "; ".join(
        f"{way.name}: " + ", ".join(f"{name}={value}" for name, value in way.settings.items())
        for way in compared
        if way.trials
    )


if __name__ == "__main__":
    main()
