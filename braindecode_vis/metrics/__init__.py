"""How good a decoded image, caption or embedding is, and how sure we are.

`image` compares pixels, `embedding` compares vectors, `identification` asks which image was meant, `suite` compares
images in published networks (`feature_networks`, `feature_correlations`, `lpips`, `semantic`), `brain` compares the
responses that a reconstruction would cause, `captions` words. All return one value per item. `protocols` holds the
retrieval rules of single papers. `uncertainty` and `exact` turn items into intervals and p-values, `multiplicity`
corrects many of them, `score` makes rows of a table and `aggregate` puts tables together. Nothing here knows where the
images or embeddings came from.
"""
