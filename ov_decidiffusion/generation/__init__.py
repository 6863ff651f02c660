"""One call to pictures."""
