"""Health of the job: heartbeats and the watchdog, stop requests, and the ranks' agreement.

Decisions that all ranks must take alike are part of an all-reduce of the step.
"""
