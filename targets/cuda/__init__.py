"""CUDA, the training source."""
