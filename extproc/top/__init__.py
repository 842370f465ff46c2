"""`extproc top`: a running service as a live picture in a terminal, from what its metrics port says."""
