"""What `benchmark.py compare` is made of: what is run, how it is run, where its results lie, how they are compared."""
