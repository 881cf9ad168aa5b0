"""The config: its schema, and reading it from files and overrides, without importing torch."""
