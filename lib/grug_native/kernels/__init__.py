"""What the devices can do, and which kernel was chosen for them."""
