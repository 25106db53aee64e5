"""What a metric computes: one value per image, embedding, caption or query; and every metric by its name."""
