"""Continued pre-training of dense and Mixture-of-Experts models, on Lightning.

`fusion_upcycle.training.run.train` is the way in; everything else is a part of it.
"""
