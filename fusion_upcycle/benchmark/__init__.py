"""Many FusionBench runs as one experiment: `python -m fusion_upcycle benchmark`."""
