"""What the ``quantization_config`` of a checkpoint says: which matrices are packed, how, and reading parts of them."""
