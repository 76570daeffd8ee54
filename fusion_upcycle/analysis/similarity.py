"""How alike the experts of a layer are: their weights, and what they make of the same tokens.

Shapes: E experts, F intermediate size, D hidden size, n tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusion_upcycle.experts import EXPERT_PARTS

#: Matrices of more experts than this are summarised in a record, not kept.
LARGEST_MATRIX = 64
_ROWS = 256  # of a matrix, that are looked at together
_TINY = 1e-30  # of a norm: what has none is similar to nothing


@torch.inference_mode()
def weight_cosines(experts: nn.Module) -> dict[str, Tensor]:
    """Cosine similarity [E, E], float64, of each flattened matrix (`gate_proj_FD`, where there is
    one, `up_proj_FD`, `down_proj_DF`), and of all of these together (`all`); biases aside."""
    grams = {
        part: sum(rows.flatten(1).double() @ rows.flatten(1).double().T for rows in chunks)
        for part, chunks in _matrices(experts).items()
    }
    grams["all"] = sum(grams.values())
    return {part: _normalised(gram) for part, gram in grams.items()}  # type: ignore[arg-type]


def _matrices(experts: Any) -> dict[str, Iterator[Tensor]]:
    """Part of `Expert` -> its rows of all experts, some at a time."""
    gated = hasattr(experts, "gate_up_proj")
    inside = experts.gate_up_proj.chunk(2, dim=1) if gated else (experts.up_proj,)
    names = EXPERT_PARTS if gated else EXPERT_PARTS[1:]
    return {
        name: iter(matrix.split(_ROWS, dim=1))
        for name, matrix in zip(names, (*inside, experts.down_proj), strict=True)
    }


@torch.inference_mode()
def output_cka(experts: nn.Module, inputs_nD: Tensor) -> tuple[Tensor, float]:
    """Linear CKA [E, E], float64, of all experts' outputs on the same tokens, and its floor.

    `CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|)` of centred outputs: 1 for the same function up to
    rotation and scale. [Kornblith et al., arXiv 1905.00414, equation 4 with a linear kernel]

    The plug-in CKA of unrelated functions is above 0, the more the fewer tokens there are for the
    hidden size. The floor is what it is here when the tokens of one of two experts are shuffled
    (mean over pairs of experts, one shuffle, seed 0): read CKA between the floor and 1.
    """
    grams_En = torch.stack([_gram(output).flatten() for output in _outputs(experts, inputs_nD)])
    number = len(inputs_nD)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    shuffled_En = grams_En.view(-1, number, number)[:, order][:, :, order].flatten(1)
    norms = grams_En.norm(dim=1).clamp_min(_TINY)
    floor = (grams_En @ shuffled_En.T) / norms[:, None] / norms
    return _normalised(grams_En @ grams_En.T), mean_off_diagonal(floor)


def _outputs(experts: nn.Module, inputs_nD: Tensor) -> Iterator[Tensor]:
    """What each expert makes of the inputs, by the model's own code: all tokens to one expert."""
    down_EDF: Tensor = experts.down_proj  # type: ignore[assignment]
    inputs = inputs_nD.to(down_EDF.device)
    weights = torch.ones(len(inputs), 1, dtype=inputs.dtype, device=inputs.device)
    for expert in range(len(down_EDF)):
        chosen = torch.full((len(inputs), 1), expert, device=inputs.device)
        yield experts(inputs, chosen, weights).cpu()


def _gram(x_nD: Tensor) -> Tensor:
    """Inner products [n, n], float64, of the rows, each column centred."""
    centred = x_nD.double() - x_nD.double().mean(0)
    return centred @ centred.T


def _normalised(gram_EE: Tensor) -> Tensor:
    norms = gram_EE.diagonal().sqrt().clamp_min(_TINY)
    return (gram_EE / norms[:, None] / norms).cpu()


def mean_off_diagonal(matrix_EE: Tensor) -> float:
    """Mean similarity of two different experts."""
    number = len(matrix_EE)
    return float((matrix_EE.sum() - matrix_EE.diagonal().sum()) / (number * (number - 1)))


def similarity_to_json(experts: nn.Module, inputs_nD: Tensor) -> dict[str, Any]:
    """`weight_cosine` (mean per matrix and of all), `output_cka` (mean), and `output_cka_floor`.

    With at most `LARGEST_MATRIX` experts, both with the `matrix` [E, E] too.
    """
    cosines, (cka, floor) = weight_cosines(experts), output_cka(experts, inputs_nD)

    def summary(matrix: Tensor) -> dict[str, Any]:
        kept = {"matrix": _rounded(matrix)} if len(matrix) <= LARGEST_MATRIX else {}
        return {"mean": mean_off_diagonal(matrix), **kept}

    return {
        "weight_cosine": summary(cosines["all"])
        | {part: mean_off_diagonal(cosines[part]) for part in EXPERT_PARTS if part in cosines},
        "output_cka": summary(cka),
        "output_cka_floor": floor,
    }


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in matrix.tolist()]
