"""The work behind the commands: foreign ``.pt`` files in, datasets described and checked. Never prints."""
