"""The networks: which there are (config), how they are loaded, and what each kind of them does."""
