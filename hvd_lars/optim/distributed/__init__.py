"""LARS steps over ranks: gradient buckets, and the part that each rank updates.

``Replicated`` all-reduces; ``Sharded`` reduce-scatters, updates a part and all-gathers.
"""
