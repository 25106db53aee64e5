"""A corpus: recordings without labels, of many people and sites, prepared once and streamed to a pretraining.

`fmri_sources` and `meeg_sources` find the runs below a root and say how each is read and cleaned; `growing` writes them
into shards of one list of channels, from which `datasets.corpus` streams windows. Knows no network and no stimulus.
"""
