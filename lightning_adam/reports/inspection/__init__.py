"""A checkpoint → what its optimizers' states tell, without a training and without the module."""
