"""From predictions to a row of the table: scores and their uncertainty.

`retrieval` ranks, `metrics` compute one value per item, `uncertainty` turns items into intervals and p-values,
`score_row` makes rows of a table; one file for each family of rows that `evaluate` writes. Nothing here knows where the
images or embeddings came from.

A p-value is counted by `uncertainty.compute_p_value`. The null comes from `uncertainty.permutation_test_folds` (images
change places), after K folds from `refits` or `uncertainty.widen_null`, for classes from `category_scores` and
`label_exchange`. `crossed` has the intervals, also of several subjects; its p-values are those of differences.
"""
