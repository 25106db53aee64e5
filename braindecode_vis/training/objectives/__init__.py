"""What the networks are trained for: plain functions of tensors, a thin module for each, and the settings.

`objectives_config` holds the settings of every kind and their base class, and imports no torch; `objective` holds what
an objective sees of a step. The functions take tensors and return a scalar, and know nothing of settings, networks or
the training loop.
"""
