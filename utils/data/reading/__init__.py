"""Reads records from files, folders and the hub."""
