"""What a selection takes and holds, as tables and pictures."""
