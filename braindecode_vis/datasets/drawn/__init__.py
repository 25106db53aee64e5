"""Images of the phantom, drawn from exact descriptions."""
