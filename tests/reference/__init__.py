"""Straight float64 transcriptions of the methods, independent of the library."""
