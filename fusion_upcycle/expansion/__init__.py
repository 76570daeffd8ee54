"""Expert upcycling: a trained MoE grows from E to M experts, top-k fixed (arXiv 2604.19835)."""
