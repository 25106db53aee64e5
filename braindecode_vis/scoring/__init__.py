"""Everything between predictions and a row of the table: how good what was decoded is, and how sure we are.

`retrieval` ranks, `metrics` compute one value per item, `uncertainty` turns items into intervals and p-values,
`score_row` makes rows of a table; one file for each family of rows that `evaluate` writes. Nothing here knows where the
images or embeddings came from.
"""
