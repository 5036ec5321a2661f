"""Fuzz targets, one for each parser of bytes that the enemy wrote. Run them with `python -m tests.fuzz`."""
