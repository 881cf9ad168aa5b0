"""This process: its terminal, its rank's standard error, allocator, files and step timer.

Nothing here knows of training.
"""
