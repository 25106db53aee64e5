"""What the data sets share: lazy parts of a recording, and readers that are safe and bounded."""
