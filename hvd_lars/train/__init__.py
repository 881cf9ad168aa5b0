"""The training loop: steps, evaluation, records, schedules, precision and profiling.

Takes plain arguments; only ``assemble`` knows the config.
"""
