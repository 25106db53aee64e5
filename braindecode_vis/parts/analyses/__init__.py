"""Analyses of finished predictions and reconstructions: what can be read off them, with what certainty."""
