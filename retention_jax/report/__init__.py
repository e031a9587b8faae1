"""Results and traces as one page: `python -m retention_jax.report`, and `python -m retention_jax.report.trace`."""
