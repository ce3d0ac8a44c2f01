"""Around a training run: starting, planning, comparing, reproducing, shipping."""
