"""The quick check for leaks that ends every run, from its files alone."""
