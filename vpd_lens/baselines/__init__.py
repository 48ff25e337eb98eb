"""What a decomposition is compared with."""
