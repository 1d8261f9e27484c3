"""Benchmarks that a user can repeat: ``spikeport bench``."""
