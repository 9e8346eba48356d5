"""Terms of a loss, one method a file."""
