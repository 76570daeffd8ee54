"""FusionBench task pool: how evenly and how differently a model uses its experts."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from fusion_bench import BaseTaskPool, auto_register_config
from fusion_bench.taskpool.dummy import get_model_summary

from fusion_upcycle.analysis.collect import collect
from fusion_upcycle.analysis.information import domain_information
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.live.routers import Routers, find_routers
from fusion_upcycle.report import Measured
from fusion_upcycle.taskpool.images import Unlabelled, load_images, load_processor
from fusion_upcycle.taskpool.pool import (
    check_options,
    in_record,
    leave_record,
    load_tokenizer,
    named,
    named_texts,
    plain,
    to_device,
)
from fusion_upcycle.texts.documents import load_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PERMUTATIONS = 200  # enough for a mean: nothing is tested here, see `analyze`


@auto_register_config
class RoutingTaskPool(BaseTaskPool):
    """Routing health beside the quality, see `python -m fusion_upcycle analyze` for all of it.

    Args:
        texts: name of a domain -> where its documents are, see `fusion_upcycle.texts.documents`.
        tokens: of each domain at most; of images, one image at least.
        tokenizer: path or Hub name; None for the model pool's own.
        images: for models of images, instead of ``texts``: name of a domain -> images, as the
            ``test_datasets`` of ``ImageClassificationTaskPool``; their labels are not looked at.
        processor: of images, as that of ``ImageClassificationTaskPool``.

    ``evaluate`` returns ``{"routing": {...}, "model_info": ...}``. In ``routing`` are, as means
    over the MoE layers unless it says otherwise: ``load_cv``, standard deviation of the experts'
    loads over their mean; ``dead_experts`` with less than a twelfth of an even share, of
    ``experts``, both summed over layers; ``entropy_bits`` of the router's distribution for a token;
    ``specialisation_bits``, mutual information of expert and domain above its mean under permuted
    labels (only with two or more domains); ``left_out``, the share of the tokens that no expert
    takes (only in expert choice). For a model without routers of ours, as a dense one,
    ``routing`` is empty.

    Raises:
        UpcyclingError: an unknown option; neither texts nor images, or both.
    """

    def __init__(
        self,
        texts: Mapping[str, Any] | None = None,
        tokens: int = 20_000,
        tokenizer: str | None = None,
        images: Mapping[str, Any] | None = None,
        processor: Any = None,
        **kwargs: Any,
    ) -> None:
        check_options(self, kwargs)
        super().__init__(**kwargs)
        if texts is not None and images is not None:
            raise UpcyclingError(
                "taskpool.texts and taskpool.images are both given. Give what the models take."
            )
        self.texts: dict[str, Any] = {}
        self.images: dict[str, Any] = {}
        if images is None:
            self.texts = named_texts(texts)
        else:
            self.images = named(plain(images), "images", "domain, {name: folder of images}")
        self._processor = plain(processor)
        self._evaluations: list[dict[str, Any]] = []

    def evaluate(self, model: "PreTrainedModel", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Listen to the routers of ``model`` on all texts or images.

        Raises:
            UpcyclingError: data that cannot be used or are not what the model takes, or an MoE
                family that is not known.
        """
        routers = find_routers(model)
        try:
            with Measured() as cost:
                health = self._health(model, routers) if routers.layers else {}
        finally:
            routers.close()
        report = {"routing": health, **get_model_summary(model)}
        self._evaluations.append({"report": report, **cost.as_record()})
        settings = {"texts": self.texts, "tokens": self.tokens, "tokenizer": self.tokenizer}
        if self.images:
            settings = {
                "images": in_record(self.images),
                "tokens": self.tokens,
                "processor": in_record(self._processor),
            }
        leave_record(self, settings, self._evaluations)
        return report

    def _health(self, model: "PreTrainedModel", routers: Routers) -> dict[str, float | int]:
        processor, data = self._data(model)
        to_device(self, model)
        counts = collect(model, routers, processor, data, tokens=self.tokens, sample=1).counts
        layers = list(counts.to_json().values())
        information = domain_information(
            counts.unit_LDUE, counts.layers, permutations=_PERMUTATIONS, seed=0
        )
        health: dict[str, float | int] = {
            "load_cv": mean(layer["load_cv"] for layer in layers),
            "dead_experts": sum(layer["dead_experts"] for layer in layers),
            "experts": routers.num_experts * len(layers),
            "entropy_bits": mean(layer["token_entropy_bits"] for layer in layers),
        }
        if information is not None:
            excess = [layer["excess_bits"] for layer in information["layers"].values()]
            health["specialisation_bits"] = mean(excess)
        if any(routers.expert_choice):
            health["left_out"] = mean(layer["left_out"] for layer in layers)
        return health

    def _data(self, model: "PreTrainedModel") -> tuple[Any, Mapping[str, Sequence[Any]]]:
        """The tokenizer or image processor, and domain -> documents or images."""
        takes_images = model.main_input_name == "pixel_values"
        if takes_images != bool(self.images):
            wanted, other = ("images", "texts") if takes_images else ("texts", "images")
            raise UpcyclingError(
                f"A {type(model).__name__} takes {wanted}, and taskpool.{other} is given. Set "
                f"taskpool.{wanted} instead."
            )
        if takes_images:
            found = {
                name: Unlabelled(load_images(name, given, "images"))
                for name, given in self.images.items()
            }
            return load_processor(self, self._processor), found
        tokenizer = load_tokenizer(self, self.tokenizer)
        return tokenizer, {
            name: load_documents(where, f"taskpool.texts.{name}")
            for name, where in self.texts.items()
        }
