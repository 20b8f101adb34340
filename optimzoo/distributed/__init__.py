"""Sharded weights: which reductions cross processes, and how.

A weight of FSDP2 or tensor parallelism is a DTensor: each process holds some of its rows, columns
or stacked matrices. The methods work on the local shards, as plain tensors, and call
:class:`Shards` for the few sums that cross processes:

========================  ==========================================================================
SCALE                     squares of sharded columns, of all weights in one all-reduce per step;
                          nothing for weights sharded along the other dimension
low-rank methods          a sketch ``[m, r]`` and its image ``[n, r]`` at a refresh; between two of
                          them ``[r, n]`` where the projected dimension is sharded, and a norm
                          (Fira, APOLLO) or ``s`` products (Natural GaLore)
SinkGD                    squares of sharded rows or columns, of each weight at each iteration
RMNP                      squares of sharded rows; nothing for weights sharded by rows
Stable-SPAM               a maximum and a norm per weight
Muon, SWAN, SCALE         whole matrices, each at one process (`map_whole_matrices`): the processes
 spectral                 share the work, and the result is that of one process
AdamS, Adam, SGD          nothing
moments in 8 bits         maxima of blocks, where a block of 256 elements is in two shards
========================  ==========================================================================

Under DDP every process has whole weights and the same gradients: nothing is sent.
"""

from optimzoo.distributed.collectives import traffic
from optimzoo.distributed.owners import map_whole_matrices
from optimzoo.distributed.shards import UNSHARDED, Shards, local_part, sum_packed

__all__ = ["UNSHARDED", "Shards", "local_part", "map_whole_matrices", "sum_packed", "traffic"]
