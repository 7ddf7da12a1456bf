"""The demo: real pairs and weights from package registries, and the table of results."""
