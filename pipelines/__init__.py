"""Stages of the pipeline (one file each), what they are made of (one folder each), and the bottom layer they share."""
