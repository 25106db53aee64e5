"""What the networks are trained for: plain functions of tensors, a thin module for each, and the settings.

`objectives_config` holds the settings of every kind and imports no torch; `objective` holds what all share. The
functions take tensors and return a scalar, and know nothing of settings, networks or the training loop.
"""
