"""How a teacher is made: replay, the gradient update, and the online loop around them."""
