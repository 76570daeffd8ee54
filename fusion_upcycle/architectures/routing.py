"""From router logits to the chosen experts and their weights, as transformers' routers do it.

Shapes: N tokens, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.errors import UpcyclingError, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class RoutingRule:
    """How one MoE layer routes.

    Attributes:
        experts_per_token: K.
        scores: of an expert; a sigmoid knows nothing of the other experts.
        normalised: whether the weights of the chosen experts are divided by their sum.
        scale: of the weights, after that.
        selection_bias_E: added to the scores for the choice of experts only; None without one.
    """

    experts_per_token: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    selection_bias_E: Tensor | None = None

    @property
    def keeps_shifts(self) -> bool:
        """Whether the same number added to all logits changes nothing."""
        return self.scores == "softmax" and (
            self.selection_bias_E is None or not self.selection_bias_E.any()
        )

    def scores_of(self, logits_NE: Tensor) -> Tensor:
        """[N, E], in float32 at least."""
        logits_NE = logits_NE if logits_NE.itemsize >= 4 else logits_NE.float()
        return logits_NE.softmax(-1) if self.scores == "softmax" else logits_NE.sigmoid()

    def preference(self, logits_NE: Tensor) -> Tensor:
        """[N, E]: what the top-k is taken of."""
        if self.selection_bias_E is None:
            return logits_NE  # the same order as the scores, and finer
        return self.scores_of(logits_NE) + self.selection_bias_E

    def weights(self, logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
        """[N, K]: weights that the experts get when they are the chosen ones."""
        if self.scores == "softmax" and self.normalised:  # the same, without underflow
            return logits_NE.gather(-1, chosen_NK).softmax(-1) * self.scale
        found_NK = self.scores_of(logits_NE).gather(-1, chosen_NK)
        if self.normalised:
            found_NK = found_NK / (found_NK.sum(-1, keepdim=True) + 1e-20)
        return found_NK * self.scale

    def route(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, K] and chosen experts [N, K], the most preferred first."""
        chosen_NK = self.preference(logits_NE).topk(self.experts_per_token, -1).indices
        return self.weights(logits_NE, chosen_NK), chosen_NK

    def for_experts(self, source_experts: tuple[int, ...]) -> "RoutingRule":
        """The rule after duplication: copies have the selection bias of their source expert."""
        bias_E = self.selection_bias_E
        return RoutingRule(
            self.experts_per_token,
            self.scores,
            self.normalised,
            self.scale,
            None if bias_E is None else bias_E[list(source_experts)],
        )


def routing_rule(config: "PreTrainedConfig", selection_bias_E: Tensor | None = None) -> RoutingRule:
    """The rule of an MoE's config, and of the selection bias of one of its layers.

    Raises:
        UpcyclingError: a family that is not known, or one with groups of experts.
    """
    config = config.get_text_config()
    routing = moe_family(config).routing
    if (groups := getattr(config, "n_group", None) or 1) > 1:
        raise UpcyclingError(
            f"This {config.model_type} model first chooses among {groups} groups of experts "
            "(n_group), and new router rows cannot be found for that. Choose "
            f"{setting('router_extension', 'copy')}."
        )
    assert (selection_bias_E is None) == (routing.selection_bias is None), config.model_type
    return RoutingRule(
        config.num_experts_per_tok,
        routing.scores,
        routing.normalised == "always" or bool(config.norm_topk_prob),
        float(getattr(config, "routed_scaling_factor", None) or 1.0),
        selection_bias_E,
    )
