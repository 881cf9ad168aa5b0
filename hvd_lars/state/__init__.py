"""The state that a run resumes from: replicas, progress, checkpoints, snapshots, run folder.

Checkpoints hold full tensors by parameter name, independent of the world size.
"""
