"""What the demo and the server share."""
