"""The README's tables and the page of results, written from the committed rows."""
