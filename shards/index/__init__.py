"""Index tars that exist already, where they are."""
