"""How much each expert of a trained MoE matters: measured once, saved, and used without a model."""

from fusion_upcycle.importance.measure import measure_importance
from fusion_upcycle.importance.scores import METRICS, Importance

__all__ = ["METRICS", "Importance", "measure_importance"]
