"""How good a decoded image or embedding is, and how sure we are.

`image` compares pixels, `embedding` compares vectors, `identification` asks which image was meant. All three
return one value per item. `uncertainty` turns items into intervals and p-values, `score` into rows of a table.
Nothing here knows where the images or embeddings came from.
"""
