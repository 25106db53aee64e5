"""Fitting networks: losses, loops, augmentation and checkpoints."""
