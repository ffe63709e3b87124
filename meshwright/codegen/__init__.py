"""From the lowered program to readable files."""
