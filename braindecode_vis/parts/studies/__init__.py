"""Many runs: sweeps, comparisons, a board, scores of outputs of other systems, and the demo."""
