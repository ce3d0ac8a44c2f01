"""Synthetic captioned scenes: grammar, renderer, captions, and the verifier that reads pictures back."""
