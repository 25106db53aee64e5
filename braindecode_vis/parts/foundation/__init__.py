"""Builds corpora of recordings without labels; holds published foundation models of EEG and fMRI as networks."""
