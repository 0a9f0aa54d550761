"""Kinds of attention, one file each. A layer sees one chunk and its state, never the sequence."""
