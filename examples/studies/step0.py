"""How far is a trained ViT from itself when its experts choose tokens, before any training?

Question: by number of experts E, capacity factor C and whether weights are normalised: which share
          of the tokens does no expert take, and what does that change?
Command:  python examples/studies/step0.py --record examples/results/step0    (1 minute)
          python examples/studies/step0.py --table examples/results/step0
Expected: from C = 4 on nearly every token is taken; C = E is exact; see docs/upcycling.md.

Plain copies in the last half of the layers, router logits of std 1, one draw; 2,000 test images in
batches of 64, among whose tokens the experts choose.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fashion import BATCH_SIZE, HOME, base
from torch import Tensor
from torch.nn.functional import kl_div

from fusion_upcycle import upcycle
from fusion_upcycle.live.loading import load_by_config, load_processor
from fusion_upcycle.report.progress import loading_bars
from fusion_upcycle.report.record import write_run_record
from fusion_upcycle.report.tables import Table, read_run_record
from fusion_upcycle.tables.images import image_mode, load_images, prepared
from fusion_upcycle.upcycling.taken import Taken, watch

SECTION = "step0"
IMAGES = 2_000
EXPERTS = (8, 32)
CAPACITIES = (1, 2, 4, None)  # None: as many as experts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, default=HOME, help="of fashion.py")
    parser.add_argument("--record", type=Path, help="measure, and write run_record.json here")
    parser.add_argument("--table", type=Path, help="print the table of a record, as Markdown")
    arguments = parser.parse_args()
    folder = arguments.table or arguments.record or Path("outputs/step0")
    if arguments.table is None:
        record = {"images": IMAGES, "rows": measure(arguments.home)}
        print(f"Run record: {write_run_record(SECTION, record, folder)}")
    print(table(read_run_record(folder)).to_markdown())


def measure(
    home: Path, experts: Sequence[int] = EXPERTS, capacities: Sequence[int | None] = CAPACITIES
) -> list[dict[str, Any]]:
    """The dense model, then each kind of MoE of it."""
    folder = base(home)
    dense = load_by_config(folder)
    batches, labels_N = read(home / "images", dense, load_processor(folder, dense))
    expected, _ = run(dense, batches)
    rows = [{"experts": 1} | distances(expected, expected, labels_N)]
    for count in experts:
        for capacity in capacities:
            for normalised in (True, False):
                options = {
                    "num_experts": count,
                    "capacity_factor": float(capacity or count),
                    "normalize_topk_prob": normalised,
                }
                logits, unchosen = run(moe(folder, options), batches)
                found = {"experts": count, "unchosen": unchosen}
                rows.append(options | found | distances(expected, logits, labels_N))
    return rows


def moe(folder: Path, options: Mapping[str, Any]) -> Any:
    """The base, upcycled."""
    with tempfile.TemporaryDirectory() as temporary, loading_bars(False):
        made = Path(temporary) / "moe"
        how = {"routing": "expert_choice", "moe_layers": "last_2"}
        upcycle(folder, made, verify="none", progress=False, **how, **options)
        return load_by_config(made)


def read(images: Path, model: Any, processor: Any) -> tuple[list[Tensor], Tensor]:
    """Batches of pixel values, and all labels."""
    source = load_images({"path": str(images), "split": "test"}, "images", splits=["test"])
    items = [source.item(index) for index in range(min(IMAGES, len(source)))]
    mode = image_mode(model.config)
    pixels = torch.stack([prepared(image, processor, mode) for image, _ in items])
    return list(pixels.split(BATCH_SIZE)), torch.tensor([label for _, label in items])


@torch.inference_mode()
def run(model: Any, batches: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Logits of all images; MoE layer -> share of the tokens that no expert took."""
    layers = {name: seen for name, seen in watched(model)}
    logits = torch.cat([model(pixel_values=batch).logits for batch in batches])
    shares = {}
    for name, seen in layers.items():
        taken = torch.cat([each.tokens_N for each in seen])
        shares[name] = 1 - taken.double().mean().item()
    return logits, shares


def watched(model: Any) -> Iterator[tuple[str, list[Taken]]]:
    """Index of each MoE layer, with a list that gets what its experts take."""
    for index, layer in enumerate(model.vit.layers):
        if hasattr(layer.mlp, "gate"):
            yield str(index), watch(layer.mlp)


def distances(expected: Tensor, logits: Tensor, labels_N: Tensor) -> dict[str, float]:
    answers, wanted = (each.double().log_softmax(-1) for each in (logits, expected))
    return {
        "kl_nats_per_image": kl_div(answers, wanted, log_target=True, reduction="batchmean").item(),
        "largest_difference": ((logits - expected).abs().max() / expected.abs().max()).item(),
        "accuracy": (logits.argmax(-1) == labels_N).double().mean().item(),
    }


def table(record: Mapping[str, Any]) -> Table:
    """A row for each E and C; normalised, and not."""
    dense, *rows = record[SECTION]["rows"]
    lines = [["dense", "", "", percent(dense["accuracy"]), "", ""]]
    for normalised, plain in zip(rows[::2], rows[1::2], strict=True):
        assert normalised["normalize_topk_prob"] and not plain["normalize_topk_prob"]
        line = [f"E = {normalised['experts']}, C = {normalised['capacity_factor']:g}"]
        line.append(" / ".join(percent(share) for share in normalised["unchosen"].values()))
        for row in (normalised, plain):
            line += [f"{row['kl_nats_per_image']:.1e}", percent(row["accuracy"])]
        lines.append(line)
    names = ["KL, nats", "accuracy, %"]
    headers = ["", "unchosen by layer, %", *names, *(f"not normalised: {name}" for name in names)]
    return Table("Step 0", headers, lines)


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


if __name__ == "__main__":
    main()
