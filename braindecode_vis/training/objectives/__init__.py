"""What the networks are trained for: one file per family of objectives, each a plain function and a thin module.

`config` holds the union over all kinds and imports without torch; `base` holds what every kind shares. The functions
take tensors and return a scalar, and know nothing of configurations, networks or the training loop.
"""
