"""The documentation site and the course, made from docs/."""
