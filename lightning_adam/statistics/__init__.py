"""Statistics of Adam: definitions, the kernels that read the tensors, and aggregation."""
