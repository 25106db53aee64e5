"""From recordings to responses that a brain encoder may see: epochs, betas, scaling, splits."""
