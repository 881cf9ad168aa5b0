"""How a LARS step spans ranks: gradient buckets, and which rank updates which part.

``Replicated`` all-reduces; ``Sharded`` reduce-scatters, updates a part and all-gathers.
"""
