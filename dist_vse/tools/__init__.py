"""What works on data, models and runs beside training; training imports none of it."""
