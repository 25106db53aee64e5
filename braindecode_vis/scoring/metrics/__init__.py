"""Metrics: one value per image, embedding, caption or query; and the registry of all metrics by name.

`metric_registry` knows every metric. `image` compares pixels, `embedding` vectors, `captions` words, `identification`
asks which image was meant, `suite` compares images in published networks (`feature_networks`, `lpips`),
`brain_correlation` the responses that a reconstruction would cause; `protocols` holds the retrieval rules of single
papers.
"""
