"""Published foundation models of EEG and fMRI as encoders."""
