"""What every layer may use: errors, logging, files, timing."""
