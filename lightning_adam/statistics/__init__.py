"""The numbers: what each statistic is, which tensors belong to it, and how they are summed up."""
