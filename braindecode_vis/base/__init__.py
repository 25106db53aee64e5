"""The base of the package: arrays, stimuli, contracts, registry, settings, store, devices, checks, consent."""
