"""The command line: results on stdout, progress and one-line errors on stderr, exit codes for scripts."""
