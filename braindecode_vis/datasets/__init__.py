"""One file per data set: reads the files that its authors published."""
