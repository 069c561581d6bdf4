"""The PDC block on Triton kernels.

In reading order: `hidden` (a tile of the hidden layer, as an operand of a matrix product), `forward` and `backward`
(the operators `pdc_block` and `pdc_block_backward`), `dense` (the operator `pdc_block_dense`, for inference).
"""
