"""Metrics of edits, with tables and pictures. Most modules here are scripts, too."""
