"""Image generators: embeddings in, uint8 images out; and the controls that every table needs."""
