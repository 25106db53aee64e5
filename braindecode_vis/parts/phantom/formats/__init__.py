"""One file per format of a phantom: its design, its files, and the plan that writes them."""
