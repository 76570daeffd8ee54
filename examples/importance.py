"""Which importance score says what an expert is worth? Scores against the truth.

Question: silence one expert (its output is zero) and the loss rises: does a score that is cheaper
          than trying each expert put them in the same order?
Command:  python examples/importance.py --record examples/results/importance    (about 5 minutes)
          python examples/importance.py --table examples/results/importance
Needs:    two cores; no download.
Expected: Spearman's rank correlation of each score with the rise of the loss on validation text:
          mean over layers, and over all experts of all layers at once.

Scores are measured on the demo's `continued` text. The interval is that of the correlation over all
experts, 95 % by resampling them: there are few.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from fusion_upcycle.demo import DOMAINS, demo_model, domain_text
from fusion_upcycle.demo.recipe import CONTEXT_LENGTH
from fusion_upcycle.importance.figure import save_importance_map
from fusion_upcycle.importance.measure import measure_importance
from fusion_upcycle.importance.scores import METRICS
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.texts.windows import calibration_sequences

SECTION = "importance"
JUDGED_TOKENS = 12_288
BUDGETS = (3_072, 49_152)  # tokens of calibration text
MODELS = {"demo MoE, 16 experts": "moe"}
RESAMPLED = 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/importance"))
    parser.add_argument("--record", type=Path, help="where to leave the run record (OUTPUT)")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record's table")
    arguments = parser.parse_args()
    folder = arguments.table or arguments.record or arguments.output
    if not arguments.table:
        found = {name: judge(name, demo, folder) for name, demo in MODELS.items()}
        record = {"budgets": BUDGETS, "judged_tokens": JUDGED_TOKENS, "models": found}
        print(f"Run record: {write_run_record(SECTION, record, folder)}")
    print(table(read_run_record(folder)).to_markdown())


def judge(name: str, demo: str, output: Path) -> dict[str, Any]:
    """All scores of a model, and the truth."""
    folder = demo_model(demo)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = {domain: domain_text(domain, "continued") for domain in DOMAINS}
    scores = {}
    for tokens in BUDGETS:
        importance = measure_importance(
            model,
            texts,
            folder / "tokenizer.json",
            tokens=tokens,
            context_length=CONTEXT_LENGTH,
            progress=True,
        )
        scores[str(tokens)] = importance.to_json()["metrics"]
    (figures := output / demo).mkdir(parents=True, exist_ok=True)
    drawn = save_importance_map(importance, figures)
    print(f"{name}: {drawn[0]}", flush=True)
    truth = silenced(model, folder)
    return {"scores": scores, "truth": truth, "spearman": all_correlations(scores, truth)}


@torch.inference_mode()
def silenced(model: Any, folder: Path) -> dict[int, list[float]]:
    """Layer -> rise of the validation loss, in nats per token, when each expert gives zero."""
    sequences = calibration_sequences(
        {domain: domain_text(domain, "validation") for domain in DOMAINS},
        folder / "tokenizer.json",
        tokens=JUDGED_TOKENS,
        context_length=CONTEXT_LENGTH,
    )
    ids_WT = torch.cat(list(sequences.ids.values()))

    def loss() -> float:
        batches = ids_WT.split(16)
        return sum(float(model(input_ids=b, labels=b).loss) * len(b) for b in batches) / len(ids_WT)

    before = loss()
    rises: dict[int, list[float]] = {}
    for number, layer in enumerate(model.model.layers):
        rises[number] = []
        for down_DF in layer.mlp.experts.down_proj:
            kept = down_DF.clone()
            down_DF.zero_()
            rises[number].append(loss() - before)
            down_DF.copy_(kept)
    return rises


def table(record: dict[str, Any]) -> Table:
    rows = [
        [
            f"{name}, {metric}, {int(tokens):,} tokens",
            f"{found['layers']:+.2f}",
            f"{found['all']:+.2f}",
            f"{found['low']:+.2f} to {found['high']:+.2f}",
        ]
        for name, model in record[SECTION]["models"].items()
        for tokens, metrics in model["spearman"].items()
        for metric, found in metrics.items()
    ]
    headers = ["model, score, calibration", "mean of layers", "all experts", "95 % interval"]
    return Table("Spearman correlation with the loss when an expert is silenced", headers, rows)


def all_correlations(scores: dict[str, Any], truth: dict[Any, Any]) -> dict[str, Any]:
    """Tokens of calibration -> metric -> its correlations with the truth."""
    return {
        tokens: {metric: correlations(metrics[metric], truth) for metric in METRICS}
        for tokens, metrics in scores.items()
    }


def correlations(scores: dict[Any, Any], truth: dict[Any, Any]) -> dict[str, float]:
    """Mean of the layers' correlations; that of all experts, and its interval."""
    frames = [pd.DataFrame({"score": scores[layer], "truth": truth[layer]}) for layer in truth]
    pooled = pd.concat(frames, ignore_index=True)
    drawn = pd.Series(
        spearman(pooled.sample(frac=1, replace=True, random_state=seed))
        for seed in range(RESAMPLED)
    )
    return {
        "layers": sum(spearman(frame) for frame in frames) / len(frames),
        "all": spearman(pooled),
        "low": float(drawn.quantile(0.025)),
        "high": float(drawn.quantile(0.975)),
    }


def spearman(frame: pd.DataFrame) -> float:
    """Pearson's correlation of the ranks, which is Spearman's and needs no scipy."""
    return float(frame["score"].rank().corr(frame["truth"].rank()))


if __name__ == "__main__":
    main()
