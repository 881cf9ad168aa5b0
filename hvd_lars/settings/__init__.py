"""Building blocks of the config's sections: field types and durations.

Reading a config imports nothing heavier than pydantic.
"""
