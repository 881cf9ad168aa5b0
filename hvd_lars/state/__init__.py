"""What a run must keep to go on: replicas, progress, checkpoints, snapshots, the run folder.

Checkpoints hold full tensors by parameter name, whatever the world size.
"""
