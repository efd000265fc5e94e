"""Bytes to columns and back: frames, payload, columns, foreign layouts."""
