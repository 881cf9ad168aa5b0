"""Predictions of a run before it is paid for: how long a step takes on how many GPUs.

Torch is not needed for it.
"""
