"""What runs frozen: encoders, the pipeline from caption to picture, and how both are found and loaded."""
