"""What a training loop needs: optimisers, metrics, moving averages."""
