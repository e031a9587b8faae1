"""Training data for gates, made from a user's own text and by the model itself."""
