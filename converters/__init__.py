"""Graph to graph, without a vendor: capture, sources, neurons, passes, verification."""
