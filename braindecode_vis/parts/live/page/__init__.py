"""The page of a live session: a small local server, and what it shows."""
