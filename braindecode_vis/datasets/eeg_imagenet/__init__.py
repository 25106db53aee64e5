"""EEG-ImageNet."""
