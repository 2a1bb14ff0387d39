"""Weight formats, a folder each."""
