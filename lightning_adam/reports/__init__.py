"""What Adam did, to look at: one list of panels, drawn in W&B and in a page of its own."""
