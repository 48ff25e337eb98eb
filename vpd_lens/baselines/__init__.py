"""What a decomposition is compared with: other ways to take the same model apart."""
