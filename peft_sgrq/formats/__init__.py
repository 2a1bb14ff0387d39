"""A weight as codes and scales, in memory and on the disk: a folder for each format."""
