"""The command line `qlora-jax`: main.py holds the table of commands, one file holds one command."""
