"""Whether the job is well: heartbeats and the watchdog, stop requests, agreement on both.

A decision that all ranks must take alike rides on an all-reduce of the step.
"""
