"""Build a run from a Config and a Communicator; the only package that knows both."""
