"""One file per data set: what its authors published, read as it lies on disk."""
