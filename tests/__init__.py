"""Tests of sublet; see README.md here for what lives where."""
