"""Kernels: the only place that imports triton. Each file has twins of plain functions, by the same names.

A twin takes and gives what its plain function does and is set in its place by `trainer.parallel.apply`. Kernels
compute in fp32 whatever the type of their operands. Sums over tokens have two stages, a partial sum per program and a
sum of those in a fixed order, and no result depends on the order in which programs run: the bits repeat. One file,
`grouped`, calls a library's kernel.
"""
