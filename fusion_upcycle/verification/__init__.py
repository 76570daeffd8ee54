"""How a result is proven: its tensors, its names and config, the function it computes.

Knows no operation: each says in its own `proof.py` what is compared with what.
"""
