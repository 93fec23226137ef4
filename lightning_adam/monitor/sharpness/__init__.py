"""How near training is to Adam's edge of stability."""
