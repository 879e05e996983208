"""Tensor maths: rope, attention, linears. Imports torch and nothing of petalite above `errors`."""
