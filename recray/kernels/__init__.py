"""Fast paths. Each file holds a plain form of the same function, in a few lines that autograd differentiates, against
which a test compares values and gradients, and says in one condition when the fast path is used."""
