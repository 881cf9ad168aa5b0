"""What sections of the YAML are made of: field types and durations.

Nothing heavier than pydantic is needed to read a config.
"""
