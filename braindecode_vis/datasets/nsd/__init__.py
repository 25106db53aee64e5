"""The Natural Scenes Dataset (fMRI): betas, time series, imagery and repacked copies."""
