"""The networks: which there are (sets), how they are loaded, and what each kind of them does."""
