"""The command line: `main`, and a module for each command. Importing this package imports nothing else."""
