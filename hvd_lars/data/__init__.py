"""Image sources, and the samples of each global batch."""
