"""Tar shards in WebDataset's layout: their index, writer, node-local cache and reader.

``hvd-lars pack`` writes them; foreign shards without an index are read as well.
"""
