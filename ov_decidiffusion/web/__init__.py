"""What the demo and the server have in common."""
