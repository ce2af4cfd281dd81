"""What people write models with: Linen modules, model families, checkpoint loading."""
