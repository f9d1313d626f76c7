"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): metadata, and tensors in quantised blocks."""
