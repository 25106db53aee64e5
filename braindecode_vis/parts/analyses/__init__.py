"""Analyses of finished predictions and reconstructions, with intervals and tests."""
