"""The network alone: E-MMDiT and its parts, its arithmetic, its weight files."""
