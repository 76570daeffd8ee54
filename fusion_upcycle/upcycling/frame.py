"""What is decided before any tensor is looked at: family, options, config and dtype of the MoE."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fusion_upcycle.architectures import ARCHITECTURES, OWN, architecture_for
from fusion_upcycle.architectures.base import Architecture, DenseLayout
from fusion_upcycle.architectures.known_fields import say_unknown
from fusion_upcycle.architectures.layout import FileLayout, file_layout
from fusion_upcycle.architectures.text_part import refuse_whole
from fusion_upcycle.checkpoint.tensors import TensorSource
from fusion_upcycle.checks import AUTO, parse_dtype
from fusion_upcycle.errors import UpcyclingError, plain_logger, setting
from fusion_upcycle.upcycling.options import UpcyclingOptions
from fusion_upcycle.upcycling.resolution import ResolvedOptions, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


log = plain_logger(__name__)


@dataclass(frozen=True)
class Frame:
    """What is decided before any tensor: the family, what the options mean, the MoE's config.

    Attributes:
        dense: layout of the source's files.
        config: of the MoE, with `architectures` and `dtype` set.
        layout: of the MoE's files.
    """

    architecture: Architecture
    dense: DenseLayout
    options: UpcyclingOptions
    resolved: ResolvedOptions
    source_config: "PreTrainedConfig"
    config: "PreTrainedConfig"
    dtype: torch.dtype
    layout: FileLayout


def plan_frame(
    source: TensorSource, source_config: "PreTrainedConfig", options: UpcyclingOptions
) -> Frame:
    """Decide family, options, config and dtype; refuse what they cannot express.

    With `target=auto`, what a family of transformers cannot express becomes our own class, if that
    can.

    Args:
        source: a dense model; only its dtypes are looked at.
        source_config: its config.
        options: what to make of it.

    Raises:
        UpcyclingError: unsupported family, option, config field or mix of dtypes.
    """
    refuse_whole(source_config, {d for a in ARCHITECTURES.values() for d in a.dense})
    family = architecture_for(source_config.model_type, options.target)
    try:
        architecture, source_config, resolved, config = _expressed(family, source_config, options)
    except UpcyclingError as refused:
        ours = ARCHITECTURES[OWN]
        if (
            options.target != AUTO
            or family.name == OWN
            or source_config.model_type not in ours.dense
        ):
            raise
        try:
            architecture, source_config, resolved, config = _expressed(ours, source_config, options)
        except UpcyclingError as error:  # of no use to one who is sent here
            raise (error if setting("target", OWN) in str(refused) else refused) from None
        log.warning("target=auto is %s, our own class, as this does not fit: %s", OWN, refused)
    say_unknown(source_config, type(config), options.ignore_config_fields)
    config.architectures = [architecture.target_class(source_config, config)]
    architecture = architecture.for_config(config)
    config.dtype = dtype = parse_dtype(options.dtype) or source_dtype(source, source_config)
    resolved.check_rows(dtype)
    architecture.check_dtype(dtype)
    dense = architecture.dense[source_config.model_type]
    layout = file_layout(config)
    return Frame(architecture, dense, options, resolved, source_config, config, dtype, layout)


def _expressed(
    family: Architecture, source: "PreTrainedConfig", options: UpcyclingOptions
) -> tuple[Architecture, "PreTrainedConfig", ResolvedOptions, "PreTrainedConfig"]:
    """The family for this model, the source's config as it reads it, the options, the MoE's config.

    Raises:
        UpcyclingError: what the family cannot express.
    """
    if (plain := family.dense[source.model_type].plain_config) is not None:
        source = plain(source)
    architecture = family.for_source(source)
    resolved = resolve(options, architecture, source)
    assert architecture.convert_config is not None, architecture.name
    try:
        config = architecture.convert_config(source, resolved.shape)
    except UpcyclingError:
        raise
    except Exception as error:  # transformers' checks raise a class of their own for each field
        raise UpcyclingError(
            f"transformers refuses the config of a {architecture.name} made of this "
            f"{source.model_type} model: {error}"
        ) from error
    return architecture, source, resolved, config


def source_dtype(source: TensorSource, config: "PreTrainedConfig") -> torch.dtype:
    """The dtype in which transformers would load the source: its config's, else its tensors'.

    Raises:
        UpcyclingError: a dtype that is not supported, or several and no word of the config.
    """
    if config.dtype is not None:
        try:
            dtype = parse_dtype(config.dtype)
        except UpcyclingError as error:
            raise UpcyclingError(f"config.json of the source, dtype: {error}") from error
        assert dtype is not None
        return dtype
    dtypes = {s.dtype for s in source.specs.values() if s.dtype.is_floating_point}
    if len(dtypes) > 1:
        raise UpcyclingError(
            f"The source mixes dtypes ({', '.join(sorted(map(str, dtypes)))}) and its config.json "
            f"names none. Choose one, as in {setting('dtype', 'bfloat16')}."
        )
    return dtypes.pop()
