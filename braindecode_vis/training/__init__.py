"""From a network and a list of objectives to a fitted brain encoder."""
