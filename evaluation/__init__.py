"""Metrics of edits, their tables and pictures. Most modules here are scripts, too."""
