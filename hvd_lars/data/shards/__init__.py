"""Tar shards in WebDataset's layout: their index, writer and node-local cache.

``hvd-lars pack`` writes them; foreign shards without an index are read as well.
"""
