"""Multiboot kernels, of both versions of the specification."""
