"""The whole YAML: its schema, and reading it from files and overrides.

Reading a config leaves torch alone.
"""
