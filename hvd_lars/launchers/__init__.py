"""The launcher that started this process, and ways to start ranks.

A launcher is known by its environment variables; reading them does not start MPI.
"""
