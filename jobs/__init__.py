"""What can be run: every job parses, reads, transforms and writes."""
