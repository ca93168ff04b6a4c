"""What is shown and exported: nothing here changes anything."""
