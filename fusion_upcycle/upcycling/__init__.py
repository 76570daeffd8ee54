"""Sparse upcycling: one dense checkpoint becomes a Mixture-of-Experts model (arXiv 2212.05055)."""
