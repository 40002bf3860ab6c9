"""Training a teacher: replay, the gradient update, and the online loop."""
