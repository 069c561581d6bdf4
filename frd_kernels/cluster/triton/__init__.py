"""The clustering on Triton kernels, for GPUs without the CUDA library: a chain of short launches.

In reading order: `layout` (what a forward pass keeps), `kernels` (all kernels, each with its launcher), `forward` and
`backward` (the operators). The ICM is computed in the folded form of `reference.icm_folded`.
"""
