"""What a model is worth: scores, sensitivities, sizes and speeds."""
