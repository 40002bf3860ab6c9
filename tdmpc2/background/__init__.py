"""Planning in the background: an agent whose actions do not wait for its plans."""
