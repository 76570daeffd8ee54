"""The shipped default: tiny byte-level models and their text, in the package."""

from fusion_upcycle.demo.models import demo_model, demo_reference
from fusion_upcycle.demo.recipe import MODELS
from fusion_upcycle.demo.texts import DOMAINS, SPLITS, domain_text

__all__ = ["DOMAINS", "MODELS", "SPLITS", "demo_model", "demo_reference", "domain_text"]
