"""What must hold on every supported TransformerLens version."""
