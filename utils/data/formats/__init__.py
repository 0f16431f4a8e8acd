"""Turn rows into texts: known data sets' common base, the user's own columns, chat templates."""
