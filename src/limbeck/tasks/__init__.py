"""Data sets and task families, one file each: texts and labels in, splits out."""
