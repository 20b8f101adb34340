"""What every room uses: files, provenance, progress, tables, timing."""
