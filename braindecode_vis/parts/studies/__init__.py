"""Questions to many runs: sweeps, comparisons, a board, scores of the outputs of others, and the demo."""
