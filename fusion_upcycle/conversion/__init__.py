"""From a plan to a folder or a live model: what every operation shares."""
