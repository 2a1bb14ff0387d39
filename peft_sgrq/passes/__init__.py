"""Running a model on data, and leaving it as it was."""
