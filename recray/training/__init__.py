"""Training: the loop, what surrounds it (context, optimiser), and the driver that starts it."""
