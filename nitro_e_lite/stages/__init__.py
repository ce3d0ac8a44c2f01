"""The mathematics of each training stage, one file a stage."""
