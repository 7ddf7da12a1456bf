"""Make shards from records: plan them, keep those that are whole, write the rest."""
