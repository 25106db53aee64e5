"""How good a decoded image, caption or embedding is, and how sure we are.

`metric_registry` knows every metric by its name. `image` compares pixels, `embedding` vectors, `caption_metrics` words,
`identification` asks which image was meant, `suite` compares images in published networks (`feature_networks`,
`lpips`), `brain_correlation` the responses that a reconstruction would cause. All return one value per item.
`protocols` holds the retrieval rules of single papers, `uncertainty` turns items into intervals and p-values and
`score` makes rows of a table. Nothing here knows where the images or embeddings came from.

The rows that `evaluate` writes: one file per family of scores.
"""
