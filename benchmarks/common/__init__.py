"""Shared helpers: files, provenance, progress, tables, timing."""
