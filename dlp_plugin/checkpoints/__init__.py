"""What is on disk: loaded, counted, written."""
