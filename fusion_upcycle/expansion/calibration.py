"""Router rows made of calibration text: `router_extension` `split` and `fit`.

The source runs streamed, one expert in memory, through transformers' own forward pass: from a
folder or from memory the same bits. What memory and disk the router inputs take says
`fusion_upcycle.expansion.router.inputs`.

Shapes: N tokens, E experts, M experts after, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusion_upcycle.architectures.layout import takes_images
from fusion_upcycle.architectures.routing import routing_rule
from fusion_upcycle.errors import UpcyclingError, plain_logger, setting
from fusion_upcycle.expansion.expansion import Expansion
from fusion_upcycle.expansion.options import ExpansionOptions
from fusion_upcycle.expansion.router.fit import fit_rows
from fusion_upcycle.expansion.router.inputs import RouterInputs, folder_router_inputs
from fusion_upcycle.expansion.router.rows import rows_report
from fusion_upcycle.expansion.router.split import check_split, split_rows
from fusion_upcycle.experts import generator_for
from fusion_upcycle.live.inputs import positions_of
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.texts.documents import named_documents
from fusion_upcycle.texts.windows import Sequences, calibration_sequences, sequence_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = plain_logger(__name__)

#: Share of the fair one below which a copy of `split` is warned of; `fit` has `min_copy_share`.
FEW = 0.5
#: Of calibration text, for importance scores and for router rows.
CALIBRATION_TOKENS = 65_536


@dataclass(frozen=True)
class CalibrationText:
    """Text that experts are scored on, and that router rows are made of.

    Attributes:
        texts: name -> documents.
        tokenizer_file: the model's `tokenizer.json`.
        tokens: divided evenly among the texts.
        context_length: tokens of a sequence.
        sequences: of that.
    """

    texts: Mapping[str, Sequence[str]]
    tokenizer_file: Path
    tokens: int
    context_length: int
    sequences: Sequences


def read_calibration(
    calibration: Mapping[str, Any] | None,
    options: ExpansionOptions,
    *,
    tokenizer_file: Path | None,
    config: "PreTrainedConfig",
    tokens: int = CALIBRATION_TOKENS,
    context_length: int | None = None,
    scored: bool = False,
    routed: bool = False,
) -> CalibrationText | None:
    """The calibration text for router rows and importance scores; None where none is given.

    Args:
        calibration: name -> documents, as `fusion_upcycle.texts.documents` takes them.
        config: of the source, checked.
        context_length: None is 1024, or what positions the model has.
        scored: whether there are importance scores already.
        routed: whether there are router rows already.

    Raises:
        UpcyclingError: text that is too short, not readable, or that nothing reads; text for a
            model of images.
    """
    rows, scores = options.calibrated is not None and not routed, options.needs_scores
    if not calibration:
        return None
    if not rows and (scored or not scores):
        why = "the importance scores are given" if scored and scores else "no scores are needed"
        raise UpcyclingError(
            f"Calibration text is given, but nothing would read it: {why}, and the router's rows "
            f"are not made of it. Choose {setting('router_extension', 'split')}, or fit, or leave "
            "the text out."
        )
    if takes_images(config):
        raise UpcyclingError(
            f"Calibration text is given, and a {config.model_type} model is given images: neither "
            "scores nor router rows can be made of them. Choose "
            f"{setting('selection', 'uniform')} and {setting('router_extension', 'noise')}, and "
            "leave the text out."
        )
    length = sequence_length(context_length, positions_of(config))
    texts = named_documents(calibration)
    sequences = calibration_sequences(texts, tokenizer_file, tokens=tokens, context_length=length)
    assert tokenizer_file is not None  # or it would have been refused
    return CalibrationText(texts, tokenizer_file, tokens, length, sequences)


def check_calibrated(expansion: Expansion) -> None:
    """Refuse, before any text is run, a plan or a router that the extension cannot serve.

    Raises:
        UpcyclingError: `split` of a plan in which experts have different numbers of copies, or of
            routers whose weights are sigmoid scores as they are.
    """
    calibrated, experts = expansion.options.calibrated, expansion.num_experts
    if calibrated is None or expansion.router_rows is not None or expansion.is_identity:
        return
    if experts == 1:
        raise UpcyclingError(
            f"router_extension={calibrated.name} keeps a choice among experts, and the source has "
            f"one. Choose {setting('router_extension', 'noise')}."
        )
    copies = expansion.total_experts // experts
    for layer, plan in expansion.plan.source_experts.items():
        bias = expansion.bias_name(layer)
        bias_E = None if bias is None else expansion.source.tensor(bias).reshape(-1)
        rule = routing_rule(expansion.source_config, bias_E)
        if calibrated.name != "split":
            continue
        check_split(rule)
        if plan != tuple(range(experts)) * copies:
            counts = [plan.count(expert) for expert in range(experts)]
            raise UpcyclingError(
                "router_extension=split needs as many copies of each expert, but the plan of layer "
                f"{layer} has {counts} places for experts 0 to {experts - 1}. Choose "
                f"{setting('router_extension', 'fit')}, or {setting('selection', 'uniform')} with "
                f"{setting('num_experts')} a multiple of {experts}."
            )


def check_before_scores(options: ExpansionOptions, stand_in: Expansion) -> None:
    """Refuse, before experts are scored, what cannot be served whatever the scores are.

    Args:
        stand_in: an expansion of the same options by another plan, chosen without scores.

    Raises:
        UpcyclingError: as `check_calibrated`; `split` with scores that must decide who gets more.
    """
    experts, total = stand_in.num_experts, stand_in.total_experts
    calibrated = options.calibrated
    if (
        calibrated is not None
        and calibrated.name == "split"
        and experts < total != experts * options.max_copies
    ):
        raise UpcyclingError(
            "router_extension=split needs as many copies of each expert, and "
            f"selection={options.selection} gives some more than others. Choose "
            f"{setting('router_extension', 'fit')}, or {setting('selection', 'uniform')} with "
            f"{setting('num_experts')} a multiple of {experts}."
        )
    check_calibrated(stand_in)


def calibrate_router(
    expansion: Expansion,
    text: CalibrationText | None,
    *,
    scratch: Path | None = None,
    progress: bool = False,
) -> Expansion:
    """The expansion with router rows made of text, and what the record says of them.

    Args:
        scratch: folder for temporary files; None is the system's.

    Returns:
        The expansion as it is where its options make rows without text, or where nothing is
        added. Else its details have, for each layer, what `RowsReport` and `split_rows` or
        `fit_rows` say, on the calibration text itself.

    Raises:
        UpcyclingError: as `split_rows`, `fit_rows` and `router_inputs`.
    """
    calibrated = expansion.options.calibrated
    if calibrated is None or expansion.is_identity or expansion.router_rows is not None:
        return expansion
    assert text is not None  # or `Expansion.check_router` has refused
    inputs = folder_router_inputs(
        expansion.source_config,
        expansion.source,
        text.sequences,
        scratch=scratch,
        progress=progress,
    )
    rows: dict[int, Tensor] = {}
    biases: dict[int, Tensor] = {}
    layers: dict[str, Any] = {}
    with progress_bar("Finding router rows", len(inputs), progress, unit="layer") as bar:
        for layer in expansion.layers:
            seen = inputs.pop(layer)  # freed as soon as it was looked at
            if not (
                bool(seen.inputs_ND.any())
                and (seen.inputs_ND @ seen.weight_ED.T.float()).isfinite().all()
            ):
                raise UpcyclingError(
                    f"No router rows can be made for layer {layer}: what its router sees and says "
                    "of the calibration text is not finite, or all zero. The source is damaged."
                )
            made, bias_M, found = _rows(expansion, layer, seen)
            # Reported is what is written.
            rows[layer] = made.to(expansion.specs[expansion.router_name(layer)].dtype)
            plan, new_rule = expansion.plan.source_experts[layer], None
            if bias_M is not None:
                biases[layer] = bias_M
                new_rule = replace(seen.rule, selection_bias_E=bias_M)
            report = rows_report(
                seen.weight_ED,
                rows[layer],
                seen.inputs_ND,
                plan,
                seen.rule,
                new_rule,
            )
            layers[str(layer)] = found | report.to_json()
            bar.update()
    _warn(layers, calibrated.options.get("min_copy_share", FEW))
    about = {
        "tokens": text.sequences.tokens,
        "calibration": text.sequences.to_json(),
        "layers": layers,
    }
    return expansion.with_router(rows, biases or None, details={"router": about})


def _warn(layers: Mapping[str, Any], few: float) -> None:
    """Say where scores are smaller now, and where a copy is hardly in use.

    A function that is kept by experts that no token reaches is worth nothing.
    """
    scales = [said["score_scale"] for said in layers.values() if "score_scale" in said]
    if scales:
        log.warning(
            "Scores of chosen experts are %.2g of what they were, and a selection bias that moves "
            "would undo the routing: train on with bias_update_rate=0 and a balance_weight, or "
            "choose %s to go on with loss-free balancing.",
            min(scales),
            setting("router_extension", "fit"),
        )
    shares = {
        layer: share
        for layer, said in layers.items()
        if (share := said["smallest_copy_share"]) is not None and share < few
    }
    if shares:
        log.warning(
            "The least used copy gets %.2f of its fair share of the calibration tokens; layers "
            "with less than %.2g: %s. Copies that few tokens reach learn little: take more "
            "calibration text, or %s with a larger min_copy_share.",
            min(shares.values()),
            few,
            ", ".join(shares),
            setting("router_extension", "fit"),
        )


def _rows(
    expansion: Expansion, layer: int, seen: RouterInputs
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Router [M, D] of a layer, its new selection bias [M] if any, and what is to be said."""
    calibrated = expansion.options.calibrated
    assert calibrated is not None
    generator = generator_for(expansion.options.seed, layer, 0, "router_extension")
    if calibrated.name == "split":
        copies = expansion.total_experts // expansion.num_experts
        made = split_rows(
            seen.weight_ED, seen.inputs_ND, copies, seen.rule, generator, **calibrated.options
        )
        said = {"margin": made.margin, "residual": made.residual}
        if made.score_scale is not None:
            said["score_scale"] = made.score_scale
        return made.rows_MD, made.selection_bias_M, said
    fitted = fit_rows(
        seen.weight_ED,
        seen.inputs_ND,
        expansion.plan.source_experts[layer],
        seen.rule,
        generator,
        **calibrated.options,
    )
    return fitted.rows_MD, None, {"fit_step": fitted.step}
