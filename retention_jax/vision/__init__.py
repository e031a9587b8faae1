"""Pictures and clips on the host: pixels to patches, and where they stand in a prompt. NumPy and Pillow, no JAX."""
