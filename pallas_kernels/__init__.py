"""Matmuls, losses and quantizers that read 4-bit weights as they are stored."""
