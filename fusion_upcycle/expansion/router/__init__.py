"""Router rows made of calibration text: `split` and `fit`."""
