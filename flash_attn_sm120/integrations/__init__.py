"""Where users already are: PyTorch's compiler and SDPA, transformers. Each module loads its library when it is used."""
