"""The pixel difference convolution on Triton kernels.

In reading order: `stencil` (windows and differences), `tiles` (tile sizes, loads and sums of a tile), `rows` (kernels
for stride 1 and dilation 1), `gather` (kernels for any geometry), `depthwise` (the operators `pdc2d_depthwise` and its
backward), `weight` (the operators `pdc_weight` and its backward).
"""
