"""The machine that trains: loop, processes, optimisers, checkpoints. No mathematics of a stage."""
