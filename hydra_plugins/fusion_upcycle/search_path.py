"""Put fusion_upcycle's config tree in front of FusionBench's, so that `method=<ours>` is ours.

Hydra imports this module in *every* Hydra application of the environment: it stays small, and
leaves every application but FusionBench alone.
"""

import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from hydra_plugins.fusion_upcycle.one_sentence import CLI_MODULE, end_in_one_sentence

PRIMARY_CONFIG = "fabric_model_fusion.yaml"


class FusionUpcycleSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # Not find_spec("fusion_bench"): that raises, FusionBench replaces itself by a lazy module.
        fusion_bench = sys.modules.get("fusion_bench")
        main = next((e.path for e in search_path.get_path() if e.provider == "main"), None)
        if fusion_bench is None or main is None:
            return

        import fusion_upcycle

        package = Path(fusion_upcycle.__file__).resolve().parent
        # In a wheel `config/` is inside the package, in a checkout beside it. By file path and not
        # pkg://fusion_upcycle.config, which an editable install in "compat" mode does not resolve.
        ours = _first_with("method", package / "config", package.parent / "config")
        main_tree = Path(main.removeprefix("file://")).resolve()
        if not _is_fusion_bench(main_tree, ours):
            return
        import fusion_upcycle.models  # so that FusionBench's own pools load our models as well

        end_in_one_sentence("__main__" if _started_as_module() else CLI_MODULE)
        if ours is None:  # going on would silently run FusionBench's method of the same name
            raise FileNotFoundError(
                f"fusion_upcycle is installed at {package} without its config tree; reinstall it"
            )
        # In front, not behind: the first file of a name wins, and FusionBench has a file
        # method/mixtral_moe_upscaling.yaml of its own.
        if main_tree != ours:
            search_path.prepend("fusion_upcycle", f"file://{ours}", anchor="main")

        # FusionBench takes ./config, where there is one, *instead of* its own tree. Started from
        # our repository root (or any folder with a ./config) it would then find no primary config,
        # no model pool and none of its methods: give it its tree back, behind everything else.
        library = Path(fusion_bench.__path__[0]).resolve().parent
        theirs = _first_with(PRIMARY_CONFIG, library / "fusion_bench_config", library / "config")
        if theirs not in (None, main_tree):
            search_path.append("fusion_bench", f"file://{theirs}")


def _is_fusion_bench(main_tree: Path, ours: Path | None) -> bool:
    """Whether FusionBench is what is being configured, and not an app that merely imports it."""
    return (
        CLI_MODULE in sys.modules
        or _started_as_module()
        or (main_tree / PRIMARY_CONFIG).is_file()  # initialize_hydra_config, and copies of its tree
        or main_tree == ours  # the same, called in our repository root
    )


def _started_as_module() -> bool:
    """`python -m`, `torchrun -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == CLI_MODULE


def _first_with(name: str, *folders: Path) -> Path | None:
    return next((folder for folder in folders if (folder / name).exists()), None)
