"""Abilities around the data flow, each in one folder; the core knows none of them."""
