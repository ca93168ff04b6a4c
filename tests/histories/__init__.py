"""Histories: any sequence of commands, any request, any bytes. See README.md here."""
