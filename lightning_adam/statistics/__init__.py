"""Statistics of Adam: their definitions, the kernels that read tensors, and how they add up."""
