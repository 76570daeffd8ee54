"""An analysis as a folder: run record, and figures and a page that are made from it alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusion_upcycle.analysis import figures
from fusion_upcycle.analysis.information import ALPHA
from fusion_upcycle.analysis.run import Analysis, compare
from fusion_upcycle.experts import EXPERT_PARTS
from fusion_upcycle.report import write_run_record
from fusion_upcycle.report.drawing import save
from fusion_upcycle.report.tables import Table, read_run_record

PAGE = "index.md"


def write_analysis(
    analysis: Analysis, folder: str | Path, *, before: Analysis | None = None
) -> Path:
    """Write `run_record.json`, figures (PNG and SVG) and `index.md`, which shows it all.

    Args:
        analysis: of `analyze`.
        folder: is made; files of the same names are replaced.
        before: the same model before training, to compare with.

    Returns:
        The page.

    Raises:
        UpcyclingError: no matplotlib, or a `before` that does not compare.
    """
    folder = Path(folder)
    comparison = compare(before, analysis) if before is not None else None
    write_run_record("analysis", analysis.record, folder)
    # Written in any case, so that nothing of an earlier run stays.
    write_run_record("analysis_before", before.record if before else {}, folder)
    write_run_record("analysis_comparison", comparison or {}, folder)
    return write_page(folder)


def write_page(folder: Path) -> Path:
    """Draw the figures and the page of a folder again, from its run record."""
    content = read_run_record(folder)
    record, comparison = content["analysis"], content["analysis_comparison"]
    parts = [*_page(record, folder)]
    if comparison:
        parts += _comparison(comparison, content["analysis_before"], folder)
    page = folder / PAGE
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _page(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    model = record["model"]
    name = Path(model["path"]).name if "path" in model else model["model_type"]
    kind = "images" if "images" in next(iter(record["domains"].values())) else "documents"
    data = ", ".join(
        f"{name} ({found['tokens']:,} tokens of {found[kind]} {kind})"
        for name, found in record["domains"].items()
    )
    yield f"# Experts of {name}"
    yield (
        f"{model['model_type']}, {model['num_experts']} experts, {_per_token(model)}, "
        f"{len(record['layers'])} MoE layers. {'Images' if kind == 'images' else 'Texts'}: {data}. "
        "All numbers are in `run_record.json`; every picture is there as SVG too."
    )
    yield "## Where tokens go"
    yield load_table(record).to_markdown()
    yield (
        "Load is an expert's share of a layer's assignments; CV its standard deviation over its "
        "mean; dead, a load below 0.01 x 8/experts. Healthy is a CV below 0.3 and a smallest load "
        "above 0.02 x 8/experts. Router entropy is that of the mean router distribution, token "
        "entropy the mean per token; margin the mean difference of a token's two largest router "
        "probabilities."
    )
    yield _picture(figures.load_map(record), folder, "load", "load of each expert")
    yield "## What experts depend on"
    if record["information"] is None:
        yield "With one domain there is nothing to compare. Give two or more, as NAME=FILE each."
    else:
        yield information_table(record).to_markdown()
        yield _information_in_words(record["information"])
        chart = figures.information_chart(record)
        yield _picture(chart, folder, "information", "mutual information of domain and expert")
        panels = figures.share_map(record, "by_domain")
        yield _picture(panels, folder, "domains", "share of each domain's tokens by expert")
    if record["token_classes"]:
        classes = ", ".join(f"{name} {count:,}" for name, count in record["token_classes"].items())
        yield f"Tokens by class, a description without a test: {classes}."
        panels = figures.share_map(record, "by_class")
        yield _picture(panels, folder, "classes", "share of each token class by expert")
    yield "## How alike experts are"
    yield similarity_table(record).to_markdown()
    yield (
        "Means over pairs of different experts; 1 is the same. Cosine is of flattened weights; CKA "
        f"is linear CKA of what all experts make of the same {record['cka_tokens']} router inputs, "
        "floor what it is when the tokens of one of two experts are shuffled."
    )
    for measure in ("weight_cosine", "output_cka"):
        if "matrix" in next(iter(record["layers"].values()))[measure]:
            panels = figures.similarity_map(record, measure)
            yield _picture(panels, folder, measure, f"{measure.replace('_', ' ')} of experts")


def _comparison(
    comparison: Mapping[str, Any], before: Mapping[str, Any], folder: Path
) -> Iterator[str]:
    yield "## Before and after"
    yield f"Before: {before['model'].get('path', before['model']['model_type'])}."
    yield comparison_table(comparison).to_markdown()
    if comparison["information"] is not None:
        yield (
            "p is that of the gain in mutual information of domain and expert, against a baseline "
            f"that swaps before and after in random {before['information']['unit']}s; adjusted for "
            f"the number of layers. A layer's experts are called specialised where it is at most "
            f"{ALPHA}."
        )
    chart = figures.comparison_chart(comparison)
    yield _picture(chart, folder, "comparison", "similarity before and after")


def _per_token(model: Mapping[str, Any]) -> str:
    match model.get("routing"):
        case "expert_choice":
            return f"{model['experts_per_token']:g} per token on average, as experts choose tokens"
        case "hash":
            return f"{model['experts_per_token']} per token, by its id"
    return f"{model['experts_per_token']} per token"


def _information_in_words(information: Mapping[str, Any]) -> str:
    unit = information["unit"]
    limits = (
        ""
        if unit == "document"
        else " A domain has fewer than 5 documents, so windows were permuted: this speaks of these "
        "texts only, not of texts like them."
    )
    return (
        "What one assignment tells about its domain, of "
        f"{information['domain_entropy_bits']:.2f} bits. Baseline: {information['permutations']} "
        f"permutations of the domain labels over {sum(information['units'])} {unit}s (seed "
        f"{information['seed']}); p is adjusted for the number of layers (Holm).{limits} A router "
        "depends on the domain before any training, since hidden states do: that experts "
        "specialised is shown by a comparison with the model before (`--before`)."
    )


def load_table(record: Mapping[str, Any]) -> Table:
    """Layers down: balance, health, entropies and margin."""
    headers = [
        "layer", "load CV", "min load / %", "max load / %", "dead",
        "router entropy / bits", "token entropy / bits", "margin", "healthy",
    ]  # fmt: skip
    left_out = any(found.get("left_out") for found in record["layers"].values())
    rows = [
        [
            layer,
            f"{found['load_cv']:.3f}",
            f"{100 * found['smallest_share']:.2f}",
            f"{100 * max(found['load']):.2f}",
            str(found["dead_experts"]),
            f"{found['router_entropy_bits']:.3f}",
            f"{found['token_entropy_bits']:.3f}",
            f"{found['top1_margin']:.4f}",
            "no" if found["limit_broken"] else "yes",
            *([f"{100 * found['left_out']:.2f}"] if left_out else []),
        ]
        for layer, found in record["layers"].items()
    ]
    return Table("Where tokens go", headers + ["taken by none / %"] * left_out, rows)


def information_table(record: Mapping[str, Any]) -> Table:
    """Layers down: mutual information of domain and expert, and its test."""
    headers = [
        "layer", "measured / bits", "permuted, mean / bits", "permuted, 95 % / bits",
        "p", "p adjusted", "depends on domain",
    ]  # fmt: skip
    rows = [
        [
            layer,
            f"{found['bits']:.4f}",
            f"{found['baseline_mean_bits']:.4f}",
            f"{found['baseline_95_bits']:.4f}",
            f"{found['p_value']:.2g}",
            f"{found['adjusted_p_value']:.2g}",
            "yes" if found["depends_on_domain"] else "not shown",
        ]
        for layer, found in record["information"]["layers"].items()
    ]
    return Table("What experts depend on", headers, rows)


def similarity_table(record: Mapping[str, Any]) -> Table:
    """Layers down: mean similarity of two experts."""
    first = next(iter(record["layers"].values()))["weight_cosine"]
    parts = {part.partition("_")[0]: part for part in EXPERT_PARTS if part in first}
    headers = ["layer", "cosine", *parts, "CKA", "CKA floor"]
    rows = []
    for layer, found in record["layers"].items():
        cosine = found["weight_cosine"]
        values = [cosine["mean"], *(cosine[part] for part in parts.values())]
        values += [found["output_cka"]["mean"], found["output_cka_floor"]]
        rows.append([layer, *(f"{value:.4f}" for value in values)])
    return Table("How alike experts are", headers, rows)


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Layers down: before and after of each measure."""
    headers = ["layer, before to after", "cosine", "CKA", "load CV", "dead"]
    information = comparison["information"]
    if information is not None:
        headers += ["information / bits", "p of the gain", "specialised"]
    rows = []
    for layer, after in comparison["after"].items():
        first = comparison["before"][layer]
        row = [layer]
        for name in ("weight_cosine", "output_cka", "load_cv"):
            row.append(f"{first[name]:.4f} to {after[name]:.4f}")
        row.append(f"{first['dead_experts']} to {after['dead_experts']}")
        if information is not None:
            found = information[layer]
            row.append(f"{found['before_bits']:.4f} to {found['after_bits']:.4f}")
            row.append(f"{found['adjusted_p_value']:.2g}")
            row.append("yes" if found["specialised"] else "not shown")
        rows.append(row)
    return Table("Before and after", headers, rows)


def _picture(figure: Any, folder: Path, name: str, alternative: str) -> str:
    save(figure, folder, name)
    return f"![{alternative}]({name}.png)"
