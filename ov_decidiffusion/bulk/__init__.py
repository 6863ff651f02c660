"""Pictures for every row of a table."""
