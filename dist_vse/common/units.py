"""Units of measure that several parts share."""

GIB = 2**30
