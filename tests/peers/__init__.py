"""What users of a torch optimizer do with one, right or wrong."""
