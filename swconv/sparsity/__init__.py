"""Sparse training: SNIP densities, random masks, prune and grow (SLaK section 4; SW section 3 and Table 8)."""

from swconv.sparsity.dynamic import SparseTraining

__all__ = ["SparseTraining"]
