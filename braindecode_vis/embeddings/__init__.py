"""Image encoders: images in, vectors of one named space out."""
