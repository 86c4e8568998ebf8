"""Private steps, and the round that is made of them."""
