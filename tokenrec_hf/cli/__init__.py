"""The `tokenrec` command."""
