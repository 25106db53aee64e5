"""Commands as jobs of a cluster, through submitit: `job` is what runs on a node, `submitting` sends it there and keeps
a list, `watching` reports how the jobs of a folder are, `sweeps` makes one array of a sweep.

A job is a command of this package with a run folder; what it computes lies there, under fingerprints, and a job that
finds its artifacts does nothing. submitit writes pickles of its own beside its logs; none is ever read as a result.
"""
