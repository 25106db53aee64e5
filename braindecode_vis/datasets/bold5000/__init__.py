"""BOLD5000 (fMRI): raw runs and released betas."""
