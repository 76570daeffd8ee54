"""The proof that every conversion ends with: its tensors, and the function it computes."""

from fusion_upcycle.verification.proof import Proof, prove, resolve_mode

__all__ = ["Proof", "prove", "resolve_mode"]
