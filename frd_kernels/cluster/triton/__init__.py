"""The clustering on Triton kernels.

In reading order: `tiles` (device functions that all share), `operands` (what the kernels of a round are given), `pool`
and `assign` (the two kernels of a round), `icm_dispatch`, `forward` (the operators `cluster` and `icm`);
`backward_operands`, `backward_dense`, `backward_round`, `backward_labels` (kernels of the gradients), `backward` (their
operators); `dispatch` (the operator `cluster_dispatch` and its backward).
"""
