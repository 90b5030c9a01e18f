"""A trained repository: how it is built, changed, audited, described and shared."""
