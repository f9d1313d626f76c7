"""A model described by a GGUF file: its config, the names of its tensors, and its tokenizer."""
