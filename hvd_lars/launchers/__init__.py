"""Who started this process, and how ranks are started here.

What a launcher says stands in environment variables; no MPI is started to read them.
"""
