"""THINGS-fMRI."""
