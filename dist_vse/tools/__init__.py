"""What uses data, models and runs besides training; training imports none of it."""
