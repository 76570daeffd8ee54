"""Several dense models of one shape into one Mixture-of-Experts model."""
