"""Common parts of the data sets: lazy parts of a recording, and readers that are safe and bounded."""
