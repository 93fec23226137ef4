"""The kernels: one tensor's elements read once, its `Row` of sums and maxima returned."""
