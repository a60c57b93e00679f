"""The commands of ``confirm-offer``, a module for each kind; worker/cli.py puts them together."""
