"""Figures of an analysis, one function each, made from its record alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion_upcycle.report.drawing import (
    LINES,
    add_colour_bar,
    chart,
    heat_map,
    panels_of,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def load_map(record: Mapping[str, Any]) -> "Figure":
    """Load of every expert in every layer, in percent of the layer's assignments."""
    layers, number = record["layers"], record["model"]["num_experts"]
    rows = [
        f"layer {layer}" + (" !" if found["limit_broken"] else "")
        for layer, found in layers.items()
    ]
    figure, [axes] = panels_of(1, number, len(rows))
    shares = [[100 * share for share in found["load"]] for found in layers.values()]
    image = heat_map(axes, shares, rows, "{:.0f}")
    axes.set_xlabel("expert   (! = outside the health limits)")
    axes.set_title(f"Load: share of a layer's assignments (even: {100 / number:.3g} %)")
    add_colour_bar(figure, image, [axes], "load / %")
    return figure


@styled
def share_map(record: Mapping[str, Any], by: str) -> "Figure":
    """How the tokens of each domain (`by_domain`) or class (`by_class`) spread over the experts."""
    layers, number = record["layers"], record["model"]["num_experts"]
    names = list(next(iter(layers.values()))[by])
    figure, panels = panels_of(len(layers), number, len(names))
    highest = max(max(found[by][name]["load"]) for found in layers.values() for name in names)
    image: Any = None
    for axes, (layer, found) in zip(panels, layers.items(), strict=True):
        shares = [[100 * share for share in found[by][name]["load"]] for name in names]
        image = heat_map(axes, shares, names, "{:.0f}", highest=100 * highest)
        axes.set_title(f"layer {layer}" + _information_in_words(record, layer, by))
        axes.set_xlabel("expert")
    kind = {"by_domain": "domain", "by_class": "token class"}[by]
    figure.suptitle(f"Where the tokens of each {kind} go (rows sum to 100 %)")
    add_colour_bar(figure, image, panels, "share of the row's assignments / %")
    return figure


def _information_in_words(record: Mapping[str, Any], layer: str, by: str) -> str:
    if by != "by_domain" or record["information"] is None:
        return ""
    found = record["information"]["layers"][layer]
    p = found["adjusted_p_value"]
    return f": {found['bits']:.3f} bits, p = {p:.2g}"


@styled
def information_chart(record: Mapping[str, Any]) -> "Figure":
    """Mutual information of domain and expert in each layer, with its permutation baseline."""
    information = record["information"]
    layers = information["layers"]
    figure, axes = chart(len(layers))
    places = range(len(layers))
    found = list(layers.values())
    mean = [layer["baseline_mean_bits"] for layer in found]
    upper = [layer["baseline_95_bits"] - layer["baseline_mean_bits"] for layer in found]
    axes.errorbar(
        places,
        mean,
        yerr=[[0.0] * len(mean), [max(0.0, up) for up in upper]],
        fmt="s",
        color=LINES[1][0],
        capsize=5,
        label="domain labels permuted: mean, and up to the 95th percentile",
    )
    bits = [layer["bits"] for layer in found]
    axes.plot(places, bits, "o", color=LINES[0][0], label="measured (* = depends on the domain)")
    for place, layer in zip(places, found, strict=True):
        if layer["depends_on_domain"]:
            axes.annotate("*", (place, layer["bits"]), (5, 0), textcoords="offset points")
    axes.set_xticks(list(places), list(layers))
    axes.set_ylim(0, 1.15 * max(*bits, *(layer["baseline_95_bits"] for layer in found), 1e-6))
    axes.set_xlabel("layer")
    axes.set_ylabel("mutual information / bits")
    axes.set_title(
        "Domain and expert: what one assignment tells about its domain\n"
        f"(of {information['domain_entropy_bits']:.2f} bits; {information['permutations']} "
        f"permutations over {sum(information['units'])} {information['unit']}s)"
    )
    figure.legend(loc="outside lower center", ncols=1)
    return figure


@styled
def similarity_map(record: Mapping[str, Any], measure: str) -> "Figure":
    """Similarity of every pair of experts in every layer: `weight_cosine` or `output_cka`."""
    layers, number = record["layers"], record["model"]["num_experts"]
    figure, panels = panels_of(len(layers), number, number)
    lowest = min(min(map(min, found[measure]["matrix"])) for found in layers.values())
    image: Any = None
    for axes, (layer, found) in zip(panels, layers.items(), strict=True):
        names = [str(expert) for expert in range(number)]
        matrix = found[measure]["matrix"]
        image = heat_map(axes, matrix, names, "{:.2f}", lowest=min(lowest, 0.0), highest=1.0)
        floor = f", floor {found['output_cka_floor']:.2f}" if measure == "output_cka" else ""
        axes.set_title(f"layer {layer}: mean {found[measure]['mean']:.3f}{floor}")
        axes.set_xlabel("expert")
        axes.set_ylabel("expert")
    label = {
        "weight_cosine": "cosine of all weights",
        "output_cka": f"linear CKA of outputs on {record['cka_tokens']} tokens",
    }[measure]
    figure.suptitle(f"Similarity of experts: {label}")
    add_colour_bar(figure, image, panels, label)
    return figure


@styled
def comparison_chart(comparison: Mapping[str, Any]) -> "Figure":
    """Similarity of a layer's experts, before and after."""
    layers = list(comparison["after"])
    figure, axes = chart(len(layers))
    styles = iter(LINES)
    for measure, label in (("weight_cosine", "cosine of weights"), ("output_cka", "output CKA")):
        for side, line in (("before", "--"), ("after", "-")):
            colour, marker = next(styles)
            values = [comparison[side][layer][measure] for layer in layers]
            name = f"{label}, {side}"
            axes.plot(range(len(layers)), values, marker + line, color=colour, label=name)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean similarity of two experts")
    axes.set_title("Did the copies diverge? (1 = the same)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
