"""Formats that both sides share. No keys, no I/O, no clock: bytes in, values out."""
