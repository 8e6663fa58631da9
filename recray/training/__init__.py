"""Training: the loop (trainer), its state on disk (state, checkpoint), and the function that starts it (launch)."""
