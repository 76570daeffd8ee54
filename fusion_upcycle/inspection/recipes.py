"""Published upcyclings: options in `config/method/recipes/`, and what the result must count.

`config/method/recipes/NAME.yaml` is a FusionBench method (`method=recipes/NAME`), and
`config/method/recipes/dense/MODEL/config.json` the config of the published dense model, so that the
result can be planned and counted without weights. To add one: the two files and an entry here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion_upcycle.errors import unknown
from fusion_upcycle.options import config_tree, names

if TYPE_CHECKING:
    from fusion_upcycle.upcycling.options import UpcyclingOptions
    from fusion_upcycle.upcycling.upcycling import Upcycling


@dataclass(frozen=True)
class Recipe:
    """What is published of one upcycled model.

    Attributes:
        dense: folder below `config/method/recipes/dense/`.
        total, active: parameters, to the digits published; None where they are not published.
        source: where they are published.
        with_embeddings: whether token embeddings and output head are in the published numbers.
    """

    dense: str
    total: str | None
    active: str | None
    source: str
    with_embeddings: bool = True


RECIPES: dict[str, Recipe] = {
    "mixtral_8x7b": Recipe("mistral_7b", "46.7B", "12.9B", "mistral.ai/news/mixtral-of-experts"),
    "mistral_7b_4_experts": Recipe(
        "mistral_7b", "24.15B", None, "FusionBench docs, algorithms/moe_based_upscaling"
    ),
    "minicpm_moe": Recipe(
        "minicpm_2b", "13.6B", "4B", "arXiv 2404.06395 and model card", with_embeddings=False
    ),
    "qwen1_5_moe_a2_7b": Recipe("qwen1_5_1_8b", "14.3B", "2.7B", "qwenlm.github.io/blog/qwen-moe"),
    "qwen2_57b_a14b": Recipe("qwen2_7b", "57B", "14B", "arXiv 2407.10671"),
    "skywork_moe": Recipe("skywork_13b", "146B", "22B", "arXiv 2406.06563", with_embeddings=False),
    "nemotron_e8g8t8": Recipe("nemotron_4_15b", None, None, "arXiv 2410.07524"),
    "llama_3_e8t2": Recipe("llama_3_8b", None, None, "arXiv 2412.09952"),
    "llm_jp_3_8x1_8b": Recipe(
        "llm_jp_3_1_8b", "9.27B", "2.92B", "model card of llm-jp/llm-jp-3-8x1.8b, arXiv 2502.19261"
    ),
    "innovator_7b": Recipe("qwen2_7b", None, "13.3B", "arXiv 2507.18671"),
    "sparse_upcycling_t5_base": Recipe("t5_v1_1_base", None, None, "arXiv 2212.05055"),
    "sparse_upcycling_t5_large": Recipe("t5_v1_1_large", None, None, "arXiv 2212.05055"),
    "sparse_upcycling_t5_xl": Recipe("t5_v1_1_xl", None, None, "arXiv 2212.05055"),
    "sparse_upcycling_vit_b16": Recipe("vit_b16", None, None, "arXiv 2212.05055"),
    "sparse_upcycling_vit_l16": Recipe("vit_l16", None, None, "arXiv 2212.05055"),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        UpcyclingError: an unknown name, with the nearest known one.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def recipe_options(name: str) -> dict[str, Any]:
    """The planning options of a recipe, as `method=recipes/NAME` of FusionBench has them."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from fusion_upcycle.upcycling.options import UpcyclingOptions

    find_recipe(name)
    with initialize_config_dir(str(config_tree()), version_base=None):
        method = compose(overrides=[f"+method=recipes/{name}"]).method
    # Initialisers are nodes with `_target_`: functions, once instantiated.
    return instantiate(OmegaConf.masked_copy(method, names(UpcyclingOptions)), _convert_="all")


def plan_recipe(name: str, options: "UpcyclingOptions") -> "Upcycling":
    """Plan `options` for the recipe's published dense model, from its config alone."""
    from fusion_upcycle.architectures.weightless import WeightlessSource
    from fusion_upcycle.checkpoint.source import read_config
    from fusion_upcycle.upcycling.plan import plan_upcycling

    config = read_config(config_tree() / "method" / "recipes" / "dense" / find_recipe(name).dense)
    return plan_upcycling(WeightlessSource(config), config, options)
