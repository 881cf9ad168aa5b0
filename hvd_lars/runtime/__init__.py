"""This process: terminal, rank stderr, allocator, files and step timer.

Nothing here depends on training.
"""
