"""Floats to packed integers to ciphertexts and back, and the proof that the sum is ours."""
