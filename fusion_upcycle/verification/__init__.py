"""The proof that every conversion ends with: its tensors, and the function it computes."""

from fusion_upcycle.verification.function import Tokens, sample_tokens
from fusion_upcycle.verification.proof import Proof, prove, resolve_mode

__all__ = ["Proof", "Tokens", "prove", "resolve_mode", "sample_tokens"]
