"""Written-out oracles: slow, plain, float64, sharing no code with hvd_lars."""
