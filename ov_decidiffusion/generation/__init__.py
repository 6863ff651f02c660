"""From one call to its pictures."""
