"""Brain encoders: responses in, image embeddings out."""
