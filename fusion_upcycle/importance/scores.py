"""Importance scores [layer, expert]: what they are of, and their JSON file."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.live.identity import describe
from fusion_upcycle.report.record import versions
from fusion_upcycle.untrusted import read_json

#: Name of the metric -> what it is; the first is the default.
METRICS = {
    "grad_squared": "sum over sequences of the squared norm of the expert's gradient",
    "saliency": "sum over sequences of |weight * gradient|, summed over the expert's weights",
    "weight_norm": "norm of the expert's weights",
    "load": "tokens routed to the expert, per token",
}
SCORES_FILE = "importance.json"
FORMAT = "fusion_upcycle importance 1"


@dataclass(frozen=True)
class Importance:
    """Scores of every expert, by one or more metrics.

    Attributes:
        metrics: name of the metric -> layer -> score of each expert, E values.
        tokens: of calibration text.
        calibration: identity of the text: `calibration.Sequences.to_json`.
        model: identity of the model: `identity.model_identity`.
        unreached: layer -> experts that no token was routed to.
    """

    metrics: Mapping[str, Mapping[int, list[float]]]
    tokens: int
    calibration: Mapping[str, Any]
    model: Mapping[str, Any]
    unreached: Mapping[int, list[int]]

    def scores(self, metric: str) -> dict[int, list[float]]:
        """Layer -> E scores, the larger the more important.

        Raises:
            UpcyclingError: a metric that is not known, or not here.
        """
        if metric not in METRICS:
            raise unknown("importance metric", metric, METRICS)
        if metric not in self.metrics:
            raise UpcyclingError(
                f"These importance scores have no {metric}, only {', '.join(self.metrics)}. "
                "Measure them again."
            )
        return {layer: list(values) for layer, values in self.metrics[metric].items()}

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse a model that the scores are not of.

        Raises:
            UpcyclingError: says which model they are of, and which was given.
        """
        # The same weights at another top-k have other scores; older files do not say theirs.
        of_top = self.model.get("experts_per_token", identity["experts_per_token"])
        if (identity["sha256"], identity["experts_per_token"]) != (self.model["sha256"], of_top):
            raise UpcyclingError(
                f"The importance scores are of {describe(self.model)}, but the model given is "
                f"{describe(identity)}. Give the scores of this model, or measure them again."
            )

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT} | asdict(self) | {"versions": versions()}

    def save(self, folder: Path) -> Path:
        """Write `importance.json`, in one step; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / SCORES_FILE
        temporary = path.with_name(f".{SCORES_FILE}.{os.getpid()}")
        text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: Path) -> "Importance":
        """Read the file, or the one in a folder.

        Raises:
            UpcyclingError: no such file, or not one of ours.
        """
        path = path / SCORES_FILE if path.is_dir() else path
        if not path.is_file():
            raise UpcyclingError(
                f"There are no importance scores at {path}: give the {SCORES_FILE} that measuring "
                "them wrote, or its folder."
            )
        try:
            return _from_json(read_json(path))
        except (
            *(ValueError, KeyError, TypeError, AttributeError),
            *(OverflowError, RecursionError),  # of what was forged
        ) as error:
            raise UpcyclingError(
                f"{path} cannot be read as importance scores ({error!r}). Measure them again."
            ) from error


def _from_json(content: Any) -> Importance:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, not {FORMAT!r}")
    metrics = {
        name: {int(layer): list(values) for layer, values in layers.items()}
        for name, layers in content["metrics"].items()
        if name != "fisher"  # which older versions measured
    }
    number = content["model"]["num_experts"]
    describe(content["model"])  # has all that an error would say of it
    if not isinstance(content["calibration"], dict) or type(content["tokens"]) is not int:
        raise TypeError("calibration and tokens are not what is written")
    for name, layers in metrics.items():
        if name not in METRICS:
            raise unknown("importance metric", name, METRICS)
        if len(layers) != len(content["metrics"][name]):
            raise ValueError(f"{name} has a layer twice")
        if layers.keys() != next(iter(metrics.values())).keys():
            raise ValueError(f"{name} has other layers")
        for layer, values in layers.items():
            fine = [is_number(value) and math.isfinite(value) and value >= 0 for value in values]
            if len(values) != number or not all(fine):
                raise ValueError(f"{name} of layer {layer} is not {number} scores of 0 or more")
    if not metrics:
        raise ValueError("no metrics")
    return Importance(
        metrics,
        content["tokens"],
        content["calibration"],
        content["model"],
        {int(layer): list(experts) for layer, experts in content["unreached"].items()},
    )
