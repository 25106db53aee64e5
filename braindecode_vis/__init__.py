"""Decode seen images from EEG, MEG and fMRI.

    recordings -> responses -> (brain encoder) -> predicted embeddings -> retrieval
                                                   |-> prior -> generator -> images -> metrics -> report
    stimuli    -> (image encoder) -> target embeddings ----^

========== =========== ============================ ================================
stage      array       dims                         unit
========== =========== ============================ ================================
preprocess Responses   trial, channel, time (M/EEG) volt or tesla, then z
preprocess Responses   trial, voxel (fMRI)          percent signal change, then z
embed      Embeddings  stimulus, [token,] feature   raw norm kept
train      Embeddings  trial, [token,] feature      same space
retrieve   similarity  query, gallery               cosine
reconstruct images     query, height, width, rgb    uint8
evaluate   Score rows  metric x method              per metric
========== =========== ============================ ================================

Importing the package imports nothing heavy; each stage is one function of `braindecode_vis.pipeline`.
"""

__version__ = "0.1.0"
