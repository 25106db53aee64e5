"""EEG, MEG and fMRI in any BIDS tree."""
