"""Building blocks of the config's sections: field types and durations.

Reading a config loads nothing heavier than pydantic.
"""
