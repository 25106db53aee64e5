"""What everything stands on: arrays, stimuli, contracts, registry, settings, store, devices, checks, consent."""
