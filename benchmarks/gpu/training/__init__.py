"""A short training run of FRD-Net on a GPU, beside eager PyTorch."""
