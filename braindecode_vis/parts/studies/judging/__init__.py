"""Tracks with frozen splits, entries of anybody, and one board of their scores.

`tracks` reads what is asked and of which trials, `entries` checks and seals answers, `entry_scores` scores them,
`entry_board` writes the site; `hidden_labels` keeps the order of test trials to the holder of a track.
"""
