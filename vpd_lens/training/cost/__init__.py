"""What a training step costs: matrix products, memory traffic, memory, and the time they take."""
