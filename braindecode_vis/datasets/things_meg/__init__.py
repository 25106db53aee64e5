"""THINGS-MEG."""
