"""THINGS-EEG2 in six layouts."""
