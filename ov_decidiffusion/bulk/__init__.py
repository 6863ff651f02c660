"""Pictures of every row of a table."""
