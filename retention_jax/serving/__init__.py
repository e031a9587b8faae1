"""Many requests at once over rows of constant size: the engine, and the conversations it parks."""
