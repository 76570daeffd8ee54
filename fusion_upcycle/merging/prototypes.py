"""Router rows from texts: each source model's own texts tell its experts from the others'.

Shapes: N models, D hidden size, T tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusion_upcycle.checks import is_number
from fusion_upcycle.errors import UpcyclingError, setting


@dataclass
class Moments:
    """What one MoE layer's router gets to see, each model on its own texts.

    Additive: of one more model there is one more row and one more summand, in the order in which
    models come, and what is kept of the others stays bit for bit.

    Attributes:
        means_ND: mean router input, float64.
        summed_DD: sum over the models of each one's mean of x x^T, float32.
    """

    means_ND: Tensor
    summed_DD: Tensor

    @classmethod
    def empty(cls, models: int, hidden_size: int) -> "Moments":
        return cls(
            torch.zeros(models, hidden_size, dtype=torch.float64),
            torch.zeros(hidden_size, hidden_size),
        )

    @property
    def second_DD(self) -> Tensor:
        """Mean of x x^T over the models, each with the same weight, float64."""
        return self.summed_DD.double() / len(self.means_ND)

    def add(self, model: int, inputs_TD: Tensor, share: float) -> None:
        """Take in some of a model's tokens, `share` of all that it is going to give."""
        inputs_TD = inputs_TD.float()
        self.means_ND[model] += inputs_TD.double().mean(0).cpu() * share
        # Free of the number of models, which one that comes later would change.
        self.summed_DD.addmm_(inputs_TD.T, inputs_TD, alpha=share / len(inputs_TD))

    def with_one_more(self) -> "Moments":
        """Room for another model; these stay as they are."""
        row = self.means_ND.new_zeros(1, self.means_ND.shape[1])
        return replace(
            self, means_ND=torch.cat([self.means_ND, row]), summed_DD=self.summed_DD.clone()
        )


def prototype(
    moments: Moments, *, logit_std: float = 1.0, whiten: bool = True, ridge: float = 0.01
) -> Tensor:
    """Router rows [N, D] by contrast: a model's mean router input minus the mean over all models.

    Whitened, this is the ridge regression from router inputs to "these are texts of model n", the
    linear discriminant; plain means let a few directions with large variance decide. DUME
    (arXiv 2603.29765) found the same router independently. Its bias and rows of unit length made
    no difference here (examples/prototypes.py), and routers of these families have no bias.

    Args:
        moments: of the layer.
        logit_std: standard deviation of the router's logits over all calibration tokens and
            experts: the inverse of a temperature.
        whiten: multiply by the inverse of the inputs' second moment.
        ridge: added to the second moment, relative to its mean diagonal.

    Raises:
        UpcyclingError: an option out of range, or models whose texts look all the same.
    """
    for name, value in (("logit_std", logit_std), ("ridge", ridge)):
        if not (is_number(value) and value > 0):
            raise UpcyclingError(f"router {name}={value!r} must be a number > 0.")
    second_DD = moments.second_DD
    rows_ND = moments.means_ND - moments.means_ND.mean(0)
    if whiten:
        loading = ridge * second_DD.diagonal().mean() * torch.eye(len(second_DD))
        rows_ND = torch.linalg.solve(second_DD + loading, rows_ND.T).T
    # The rows add up to zero, so that the logits' mean over experts is zero for every token.
    variance = (rows_ND @ second_DD * rows_ND).sum(1).mean()
    if not variance > 0:
        raise UpcyclingError(
            "The models' calibration texts give the same mean router input, so that no router can "
            "tell them apart. Give each model texts of its own, or choose "
            f"{setting('router_init', 'normal')}."
        )
    return (rows_ND * (logit_std / variance.sqrt())).float()
