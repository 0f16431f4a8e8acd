"""Turns rows into texts: the base of the known data sets, the user's own columns, chat templates."""
