"""Lightning callbacks: they decide when, and call the plain functions that decide what."""
